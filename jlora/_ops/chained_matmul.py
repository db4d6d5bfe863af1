"""Two factors in a row that share no letter, as in a Kronecker product, without the value between them being kept.

    k = h C,    y = k B;    in letters  ac, rd  on  h: (t, a, r),  k: (t, c, r),  y: (t, c, d)

The gradient of B takes k, which is as large as h. XLA would compute k a second time at once, and keep it: nothing that
it needs is still to come. So the backward pass computes it beside what it computes anyway, in one product of the two:

    [h, gk] [[0, C], [C^T, 0]] = [gh, k],    gk = g B^T,    dC = h^T gk,    dB = k^T g
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ops.matmul import eager, rank_matmul

Terms = tuple[str, str, str, str]  # of h, C, B and y
_JOINT, _TURNED = "+-"  # stand for both letters of C, one after the other, before and after the product


def chained_matmul(h: jax.Array, c: jax.Array, b: jax.Array, terms: Terms, **params: Any) -> jax.Array:
    """Contracts an activation with a matrix, and then with a factor that has none of the matrix's letters.

    Arguments:
        h, c, b: the activation and the factors, in one dtype.
        terms: the letters of all three and of the result. Letters that the operands have in common are contracted.
        params: `first`, whether activations are left operands; `precision`, as in `jax.lax.dot_general`; and `dtype`,
            that of the result.
    """
    static = functools.partial(_through, terms, tuple(params.items()))
    return static(h, c, b) if _compat.is_for_cpu(h, c, b) else _plain(h, c, b, terms=terms, **params)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _through(terms: Terms, params: Any, *operands: jax.Array) -> jax.Array:
    return _plain(*operands, terms=terms, **dict(params))


@_through.defjvp
def _jvp(terms: Terms, params: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    tangent = tangent_p.bind(*primals, *tangents, terms=terms, **dict(params))
    return _through(terms, params, *primals), tangent


def _plain(h: Any, c: Any, b: Any, *, terms: Terms, dtype: Any, **params: Any) -> jax.Array:
    k, letters = _pair(h, terms[0], c, terms[1], dtype=h.dtype, **params)
    y, letters = _pair(k, letters, b, terms[2], dtype=dtype, **params)
    return _arranged(y, letters, terms[3])


def _tangent(*operands: Any, **params: Any) -> jax.Array:
    return jax.jvp(functools.partial(_plain, **params), operands[:3], operands[3:])[1]


def _pair(x: Any, xs: str, t: Any, ts: str, *, first: bool, **params: Any) -> tuple[jax.Array, str]:
    """One product that contracts all letters in common."""
    left, ls, right, rs = (x, xs, t, ts) if first else (t, ts, x, xs)
    inner = [c for c in xs if c in ts]
    contracted = tuple(ls.index(c) for c in inner), tuple(rs.index(c) for c in inner)
    return rank_matmul(left, right, contracted, **params), "".join(c for c in ls + rs if c not in inner)


def _arranged(x: jax.Array, letters: str, out: Sequence[str]) -> jax.Array:
    order = [letters.index(c) for c in out]
    return x if order == sorted(order) else x.transpose(order)


def _transpose(g: Any, h: Any, c: Any, b: Any, *linear: Any, terms: Terms, dtype: Any, **params: Any) -> list[Any]:
    if isinstance(g, ad.Zero):
        return [None] * 6
    hs, cs, bs, ys = terms
    inner, outer = sorted(cs, key=lambda letter: letter not in hs)
    shared = "".join(letter for letter in hs if letter != inner)
    gk, ks = _pair(g, ys, b, bs, dtype=h.dtype, **params)

    beside = jnp.concatenate([h, _arranged(gk, ks, hs.replace(inner, outer))], hs.index(inner))
    beside = _arranged(beside, hs.replace(inner, _JOINT), shared + _JOINT)
    matrix = _arranged(c, cs, inner + outer)
    a, n = matrix.shape
    turn = jnp.block([[jnp.zeros((a, a), c.dtype), matrix], [matrix.T, jnp.zeros((n, n), c.dtype)]])
    both, spelled = _pair(beside, shared + _JOINT, turn, _JOINT + _TURNED, dtype=h.dtype, **params)
    gh, k = jnp.split(both, [a], spelled.index(_TURNED))
    gh = _arranged(gh, spelled.replace(_TURNED, inner), hs)

    order = "".join([*(letter for letter in ys if letter in ks), *(letter for letter in bs if letter in ks)])
    k = _arranged(k, spelled.replace(_TURNED, outer), order)
    db = _pair(k, order, g, ys, dtype=b.dtype, **params)
    gk = _arranged(gk, ks, shared + outer)
    dc, spelled = _pair(beside, shared + _JOINT, gk, shared + outer, dtype=c.dtype, **params)
    dc = lax.slice_in_dim(dc, 0, a, axis=spelled.index(_JOINT))
    cotangents = gh, _arranged(dc, spelled.replace(_JOINT, inner), cs), _arranged(*db, bs)
    made = zip(linear, cotangents, strict=True)
    return [None, None, None, *(value if ad.is_undefined_primal(operand) else None for operand, value in made)]


def _tangent_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(functools.partial(_tangent, **params), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _batched(operands: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(functools.partial(_tangent, **params), in_axes=axes)(*operands), 0


def _abstract(h: Any, c: Any, b: Any, *_: Any, terms: Terms, dtype: Any, **params: Any) -> Any:
    known = zip(terms, (h, c, b), strict=False)
    sizes = {letter: n for term, a in known for letter, n in zip(term, a.shape, strict=True)}
    return jax.typeof(jax.ShapeDtypeStruct([sizes[letter] for letter in terms[3]], dtype))


tangent_p = Primitive("jlora_through_tangent")
tangent_p.def_impl(eager(tangent_p, _tangent, ("terms", "first", "precision", "dtype")))
tangent_p.def_abstract_eval(_abstract)
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _transpose
batching.primitive_batchers[tangent_p] = _batched
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent, multiple_results=False))
