"""Two consecutive contractions whose factors share no index (Kronecker), whose backward pass saves no intermediate.

    k = h C,    y = k B;    with indices  ac, rd  on  h: (t, a, r),  k: (t, c, r),  y: (t, c, d)

The gradient of B takes k, as large as h. `jax.checkpoint` does not help on the CPU, where XLA computes k once and keeps
it: measured temporaries are those without it. So the backward pass is two calls, which XLA does not inline, and which
need g: the one for B computes k again, and neither keeps an activation.

    gk = g B^T,    gh = gk C^T,    dC = h^T gk,    k = h C,    dB = k^T g
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir
from jlora._ops.matmul import eager, rank_matmul

Terms = tuple[str, str, str, str]  # of h, C, B and y


def chained_matmul(h: jax.Array, c: jax.Array, b: jax.Array, terms: Terms, **params: Any) -> jax.Array:
    """Contracts an activation with a matrix, and then with a factor that has none of the matrix's indices.

    Arguments:
        h, c, b: the activation and the factors, in one dtype.
        terms: the indices of all three and of the result. Indices that two operands share are contracted.
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
    k, labels = _pair(h, terms[0], c, terms[1], dtype=h.dtype, **params)
    y, labels = _pair(k, labels, b, terms[2], dtype=dtype, **params)
    return _arranged(y, labels, terms[3])


def _tangent(*operands: Any, **params: Any) -> jax.Array:
    return jax.jvp(functools.partial(_plain, **params), operands[:3], operands[3:])[1]


def _pair(x: Any, xs: str, t: Any, ts: str, *, first: bool, **params: Any) -> tuple[jax.Array, str]:
    """One product that contracts all shared indices."""
    left, ls, right, rs = (x, xs, t, ts) if first else (t, ts, x, xs)
    inner = [c for c in xs if c in ts]
    contracted = tuple(ls.index(c) for c in inner), tuple(rs.index(c) for c in inner)
    return rank_matmul(left, right, contracted, **params), "".join(c for c in ls + rs if c not in inner)


def _arranged(x: jax.Array, labels: str, out: Sequence[str]) -> jax.Array:
    order = [labels.index(c) for c in out]
    return x if order == sorted(order) else x.transpose(order)


def _transpose(g: Any, h: Any, c: Any, b: Any, *linear: Any, terms: Terms, dtype: Any, **params: Any) -> list[Any]:
    if isinstance(g, ad.Zero):
        return [None] * 6
    static = terms, tuple(params.items())
    gh, dc = _compat.call_apart(_gradients_of_first, *static, g, h, c, b)
    cotangents = gh, dc, _compat.call_apart(_gradient_of_second, *static, g, h, c, b)
    results = zip(linear, cotangents, strict=True)
    return [None, None, None, *(value if ad.is_undefined_primal(operand) else None for operand, value in results)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients_of_first(terms: Terms, params: Any, g: Any, h: Any, c: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    """The gradients of h and C."""
    (hs, cs, bs, ys), options = terms, dict(params)
    gk, ks = _pair(g, ys, b, bs, dtype=h.dtype, **options)
    gh, gh_labels = _pair(gk, ks, c, cs, dtype=h.dtype, **options)
    return _arranged(gh, gh_labels, hs), _arranged(*_pair(h, hs, gk, ks, dtype=c.dtype, **options), cs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient_of_second(terms: Terms, params: Any, g: Any, h: Any, c: Any, b: Any) -> jax.Array:
    """The gradient of B."""
    (hs, cs, bs, ys), options = terms, dict(params)
    k, ks = _pair(h, hs, c, cs, dtype=h.dtype, **options)
    order = "".join([*(name for name in ys if name in ks), *(name for name in bs if name in ks)])
    return _arranged(*_pair(_arranged(k, ks, order), order, g, ys, dtype=b.dtype, **options), bs)


def _tangent_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(functools.partial(_tangent, **params), primals, tuple(map(ad.instantiate_zeros, tangents)))


def _batched(operands: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(functools.partial(_tangent, **params), in_axes=axes)(*operands), 0


def _abstract(h: Any, c: Any, b: Any, *_: Any, terms: Terms, dtype: Any, **params: Any) -> Any:
    operands = zip(terms, (h, c, b), strict=False)
    sizes = {name: n for term, a in operands for name, n in zip(term, a.shape, strict=True)}
    return jax.typeof(jax.ShapeDtypeStruct([sizes[name] for name in terms[3]], dtype))


tangent_p = Primitive("jlora_through_tangent")
tangent_p.def_impl(eager(tangent_p, _tangent, ("terms", "first", "precision", "dtype")))
tangent_p.def_abstract_eval(_abstract)
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _transpose
batching.primitive_batchers[tangent_p] = _batched
mlir.register_lowering(tangent_p, mlir.lower_fun(_tangent, multiple_results=False))
