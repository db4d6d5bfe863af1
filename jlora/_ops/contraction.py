"""Products of an activation with a network, one factor at a time: the order that never forms the weight."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jlora._ir.algebra import align_axes
from jlora._ir.weight import AxisScale, TensorNetwork
from jlora._ops.chained_matmul import chained_matmul
from jlora._ops.matmul import rank_matmul


def apply_network(
    x: jax.Array,
    letters: str,
    network: TensorNetwork,
    out: str,
    *,
    dtype: jnp.dtype,
    first: bool = True,
    precision: Any = None,
    groups: tuple[str, jax.Array] | None = None,
) -> jax.Array:
    """`scale * einsum(x, factors -> out)`, where `x` takes up the factors from the inside out.

    Arguments:
        x: the activation.
        letters: one letter for every axis of `x`. Letters that are not in `out` are contracted.
        network: what the weight's update is made of.
        out: the letters of the result, in order.
        dtype: of the result. Factors are cast to the dtype of `x` where they meet it.
        first: whether `x` is the left operand, which says on which side its free axes end up.
        precision: as in `jax.lax.dot_general`.
        groups: for a ragged product, the letter of the groups and their sizes along the only free axis of `x`.
    """
    x = apply_dropout(x, letters, network)
    compute = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else dtype
    x = x.astype(compute)
    terms = _ordered(_absorbed(list(zip(network.factors, network.terms, strict=True))), letters, out)
    if terms and network.scale != 1:  # into what the activation meets first, before that is cast
        (factor, term), *rest = terms
        terms = [(factor * jnp.asarray(network.scale, factor.dtype), term), *rest]
    terms = [(factor.astype(compute), term) for factor, term in terms]
    done = 0
    while done < len(terms):
        x = name_intermediate(x) if done else x
        (factor, term), *rest = terms[done:]
        later = "".join([out, groups[0] if groups else "", *(t for _, t in rest)])
        two = done > 0 and not groups and _apart(letters, [term, *(t for _, t in rest)], out)
        done += 2 if two else 1
        options: Any = {"dtype": compute if done < len(terms) else dtype, "first": first, "precision": precision}
        if two:
            (other, end), *rest = rest
            later = "".join([out, *(t for _, t in rest)])
            reached = "".join(c for c in letters + term + end if c in later)
            x, letters = chained_matmul(x, factor, other, (letters, term, end, reached), **options), reached
        else:
            x, letters = contract_pair(x, letters, factor, term, later, groups=groups, **options)
    return align_axes(x.astype(dtype), letters, out)


def _apart(letters: str, terms: Sequence[str], out: str) -> bool:
    """Whether the next two terms, of which the first is a matrix, share no letter and contract all they meet of `x`."""
    if len(terms) < 2 or len(terms[0]) != 2 or set(terms[0]) & set(terms[1]):
        return False
    known, later = set(letters), set(out).union(*terms[2:])
    met = [known & set(term) for term in terms[:2]]
    new = set(terms[0] + terms[1]) - known
    return all(met) and len(met[0]) == 1 and not (met[0] | met[1]) & later and new <= later


def name_intermediate(x: jax.Array) -> jax.Array:
    """An activation between two factors, under the name by which policies of `jax.checkpoint` know it."""
    return checkpoint_name(x, "jlora")


def apply_dropout(x: jax.Array, letters: str, network: TensorNetwork) -> jax.Array:
    """Dropout of a branch's input, one mask for every key of a stacked weight."""
    if network.key is None:
        return x
    key, term = network.key, network.key_term
    for name in [c for c in term if c not in letters]:  # keys of an axis that the input lacks: one is enough
        key, term = jnp.take(key, 0, axis=term.index(name)), term.replace(name, "")
    order = [letters.index(c) for c in term]
    rest = [k for k in range(x.ndim) if k not in order]
    shape = tuple(x.shape[k] for k in rest)
    draw = jnp.vectorize(lambda k: jax.random.bernoulli(k, 1 - network.rate, shape), signature=f"()->({_dims(shape)})")
    mask = draw(key).transpose([(*order, *rest).index(k) for k in range(x.ndim)])
    return jnp.where(mask, x / jnp.asarray(1 - network.rate, x.dtype), jnp.zeros_like(x))


def apply_axis_scales(x: jax.Array, letters: str, sizes: Mapping[str, int], gains: Sequence[AxisScale]) -> jax.Array:
    """`x` times every gain, in the shape that it came in; `letters` spell it out."""
    for g in gains:
        wide = x.reshape([sizes[c] for c in letters])
        x = (wide * align_axes(g.vector.astype(x.dtype), g.indices, letters)).reshape(x.shape)
    return x


def _dims(shape: Sequence[int]) -> str:
    return ",".join(f"d{k}" for k in range(len(shape)))


def _absorbed(terms: list[tuple[jax.Array, str]]) -> list[tuple[jax.Array, str]]:
    """Multiplies each vector into a factor that has its letters: a product of small things, not of activations."""
    out: list[tuple[jax.Array, str]] = []
    for factor, term in sorted(terms, key=lambda item: -len(item[1])):
        at = next((k for k, (_, other) in enumerate(out) if set(term) <= set(other)), None)
        if at is None:
            out.append((factor, term))
        else:
            out[at] = (out[at][0] * align_axes(factor, term, out[at][1]), out[at][1])
    return out


def _ordered(terms: list[tuple[jax.Array, str]], letters: str, out: str) -> list[tuple[jax.Array, str]]:
    """Terms in the order in which the activation takes them up.

    First those that multiply it or contract a letter of it, the one by which it grows least before the others.
    """
    left, ready, known = list(terms), [], set(letters)

    def cost(item: tuple[jax.Array, str]) -> tuple[bool, float]:
        others = set(out).union(*(t for _, t in left if t is not item[1]))
        contracts = bool((set(item[1]) & known) - others)
        return not (contracts or set(item[1]) <= known), _growth(*item, known)

    while left:
        best = min(left, key=cost)
        left = [item for item in left if item is not best]
        known |= set(best[1])
        ready.append(best)
    return ready


def _growth(factor: jax.Array, term: str, letters: set[str]) -> float:
    """By how much the activation grows when it takes up a factor."""
    sizes = dict(zip(term, factor.shape, strict=True))
    return math.prod(n for c, n in sizes.items() if c not in letters) / math.prod(
        n for c, n in sizes.items() if c in letters
    )


def contract_pair(
    x: jax.Array,
    xs: str,
    t: jax.Array,
    ts: str,
    keep: str,
    *,
    dtype: jnp.dtype,
    first: bool = True,
    precision: Any = None,
    groups: tuple[str, jax.Array] | None = None,
) -> tuple[jax.Array, str]:
    """One product of two arrays in letters: shared letters in `keep` are batched, the others contracted."""
    t, ts = _sum(t, ts, xs + keep)
    x, xs = _sum(x, xs, ts + keep)
    if groups and groups[0] in ts:
        return _ragged(x, xs, t, ts, keep, groups, dtype=dtype, precision=precision)
    inner = [c for c in xs if c in ts and c not in keep]
    if not inner and set(ts) <= set(xs):
        return x * align_axes(t, ts, xs), xs
    batch = [c for c in xs if c in ts and c in keep]
    rest = "".join(batch)
    x_free, t_free = ("".join(c for c in s if c not in batch and c not in inner) for s in (xs, ts))
    left, ls, right, rs = (x, xs, t, ts) if first else (t, ts, x, xs)
    contracted = tuple(ls.index(c) for c in inner), tuple(rs.index(c) for c in inner)
    if batch:
        dims = contracted, (tuple(ls.index(c) for c in batch), tuple(rs.index(c) for c in batch))
        y = lax.dot_general(left, right, dims, precision=precision, preferred_element_type=dtype)
    else:
        y = rank_matmul(left, right, contracted, precision=precision, dtype=dtype)
    return y, rest + (x_free + t_free if first else t_free + x_free)


def _sum(x: jax.Array, letters: str, keep: str) -> tuple[jax.Array, str]:
    """Sums the letters that nothing else has."""
    lone = tuple(k for k, c in enumerate(letters) if c not in keep)
    return (x.sum(lone), "".join(c for c in letters if c in keep)) if lone else (x, letters)


def _ragged(
    x: jax.Array,
    xs: str,
    t: jax.Array,
    ts: str,
    keep: str,
    groups: tuple[str, jax.Array],
    *,
    dtype: jnp.dtype,
    precision: Any,
) -> tuple[jax.Array, str]:
    name, sizes = groups
    batch = [c for c in xs if c in ts and c in keep]
    inner = [c for c in xs if c in ts and c not in keep]
    (rows,) = (c for c in xs if c not in ts)
    pairs = [([xs.index(c) for c in cs], [ts.index(c) for c in cs]) for cs in (inner, batch)]
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(pairs[0], pairs[1]),
        lhs_ragged_dimensions=[xs.index(rows)],
        rhs_group_dimensions=[ts.index(name)],
    )
    y = lax.ragged_dot_general(x, t, sizes, dims, precision=precision, preferred_element_type=dtype)
    return y, "".join([*batch, rows, *(c for c in ts if c not in (*batch, *inner, name))])
