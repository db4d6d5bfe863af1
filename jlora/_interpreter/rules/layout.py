"""What programs do to a weight before they use it: reorder, reshape, cast, cut, join and scale. Nothing is formed."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._interpreter.context import Context, Value
from jlora._ir import lazy as _deferred
from jlora._ir.algebra import barrier, drop_index, map_index, merge_indices, relabel, rename_indices, split_index
from jlora._ir.materialize import dense
from jlora._ir.partition import shardings_like
from jlora._ir.weight import AdaptedWeight, AxisScale, Index, TensorNetwork, fresh_indices

Rule = Callable[..., list[Value] | None]


def unchanged(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    """What leaves shape and meaning alone: the base alone goes through."""
    return [dataclasses.replace(f, base=_deferred.bind(eqn, f.base)[0])]


def reshard(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    """Factors are laid anew as the weight is."""
    (base,) = _deferred.consume(eqn, _deferred.materialize(f.base))
    return [jax.sharding.reshard(dataclasses.replace(f, base=base), shardings_like(f, jax.typeof(base).sharding))]


def device_put(ctx: Context, eqn: Any, *values: Value) -> list[Value] | None:
    """To another kind of memory the factors go too; a sharding is the weight's alone."""
    bases = [v.base if isinstance(v, AdaptedWeight) else v for v in values]
    if len(values) > 1 and any(isinstance(base, _deferred.LazyArray) for base in bases):
        return None

    def moved(f: AdaptedWeight, base: Any, device: Any) -> AdaptedWeight:
        there = device is None or isinstance(device, jax.sharding.Sharding)
        f = dataclasses.replace(f, base=None)
        return dataclasses.replace(f if there else jax.device_put(f, device), base=base)

    results = zip(values, _deferred.bind(eqn, *bases), eqn.params["devices"], strict=True)
    return [moved(v, base, device) if isinstance(v, AdaptedWeight) else base for v, base, device in results]


def convert_element_type(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    return unchanged(ctx, eqn, f) if jnp.issubdtype(eqn.params["new_dtype"], jnp.floating) else None


def stop_gradient(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    """Stops the factors' gradients too, as it would stop those of the merged weight."""
    return [jax.tree.map(lax.stop_gradient, f)]


def optimization_barrier(ctx: Context, eqn: Any, *values: Value) -> list[Value] | None:
    return barrier(values)


def transpose(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    (base,) = _deferred.bind(eqn, f.base)
    return [relabel(f, base, [f.axes[k] for k in eqn.params["permutation"]])]


def squeeze(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    (base,) = _deferred.bind(eqn, f.base)
    gone = [k % len(f.axes) for k in eqn.params["dimensions"]]
    axes = [a for k, a in enumerate(f.axes) if k not in gone]
    for k in gone:
        for name in f.axes[k]:
            f = drop_index(f, name)
    return [relabel(f, base, axes)]


def reshape(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    """Splits and joins axes by splitting and joining letters."""
    if f.base.size == 0:
        return None
    (base,) = _deferred.bind(eqn, f.base)
    order = eqn.params["dimensions"]
    f = f if order is None else dataclasses.replace(f, axes=tuple(f.axes[k] for k in order))
    return _respelled(f, base) or _respelled(
        merge_indices(f), base
    )  # letters that were split may have to be joined first


def _respelled(f: AdaptedWeight, base: jax.Array) -> list[Value] | None:
    """The letters dealt out to the axes of `base`, split where one ends within a letter."""
    for letter in f.indices:  # letters of size one have no place of their own
        if letter.size == 1:
            f = drop_index(f, letter.name)
    left = [c for axis in f.axes for c in axis if f.size(c) > 1]
    axes, new = [], []
    for size in base.shape:
        axis, reach = "", 1
        while reach < size:
            name = left.pop(0)
            whole, part = f.index(name).size, size // reach
            if whole > part or part % whole:
                if size % reach or whole % part:
                    return None
                before = {x.name for x in f.indices}
                f = split_index(f, name, (part, whole // part))
                left.insert(0, next(x.name for x in f.indices if x.name not in before))
                whole = part
            axis, reach = axis + name, reach * whole
        axes.append(axis)
    for k, axis in enumerate(axes):  # axes of size one: only now, so that no split takes their letters
        if not axis:
            axes[k] = fresh_indices([f.used(), *axes])
            new.append(Index(axes[k], 1))
    return [relabel(f, base, axes, new)]


def broadcast_in_dim(ctx: Context, eqn: Any, f: AdaptedWeight, *sizes: Value) -> list[Value] | None:
    """New axes, and axes of size one that grow, get letters that no factor carries."""
    if sizes:
        return None
    (base,) = _deferred.bind(eqn, f.base)
    came = dict(zip(eqn.params["broadcast_dimensions"], range(len(f.axes)), strict=True))
    axes, new = [], []
    for k, size in enumerate(base.shape):
        if k in came and f.shape[came[k]] == size:
            axes.append(f.axes[came[k]])
            continue
        if k in came:
            for name in f.axes[came[k]]:
                f = drop_index(f, name)
        axes.append(fresh_indices([f.used(), *axes]))
        new.append(Index(axes[-1], size))
    return [relabel(f, base, axes, new)]


def tile(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    """Each axis that is repeated gets a major letter that no factor carries."""
    (base,) = _deferred.bind(eqn, f.base)
    axes, new = [], []
    for axis, count in zip(f.axes, eqn.params["reps"], strict=True):
        if count != 1:
            new.append(Index(fresh_indices([f.used(), *axes]), count))
            axis = new[-1].name + axis
        axes.append(axis)
    return [relabel(f, base, axes, new)]


def all_gather(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    """Collects the pieces of a weight that is cut over devices: of every factor that has the axis, its major letter."""
    p = eqn.params
    axis = p["all_gather_dimension"]
    major, minor = f.axes[axis][0], f.size(f.axes[axis][1:])
    if not p["tiled"] or any(major not in "".join(n.terms) for n in f.networks):
        return None
    (base,) = _deferred.bind(eqn, f.base)

    def gathered(a: jax.Array, k: int) -> jax.Array:
        return lax.all_gather(a, p["axis_name"], axis=k, tiled=True, axis_index_groups=p["axis_index_groups"])

    return [dataclasses.replace(map_index(f, major, gathered, base.shape[axis] // minor), base=base)]


def rev(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    (base,) = _deferred.bind(eqn, f.base)
    for k in eqn.params["dimensions"]:
        for name in f.axes[k]:
            f = map_index(f, name, lambda a, axis: lax.rev(a, (axis,)), f.index(name).size)
    return [dataclasses.replace(f, base=base)]


def slice_(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    p = eqn.params
    strides = p["strides"] or [1] * len(f.axes)
    cuts = list(zip(p["start_indices"], p["limit_indices"], strides, strict=True))
    return _cut(f, _deferred.bind(eqn, f.base)[0], cuts)


def split(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    axis, start, out = eqn.params["axis"], 0, []
    for size, base in zip(eqn.params["sizes"], _deferred.bind(eqn, f.base), strict=True):
        cuts = [(start, start + size, 1) if k == axis else (0, n, 1) for k, n in enumerate(f.shape)]
        piece = _cut(f, base, cuts)
        if piece is None:
            return None
        out += piece
        start += size
    return out


def _cut(f: AdaptedWeight, base: jax.Array, cuts: list[tuple[int, int, int]]) -> list[Value] | None:
    f = merge_indices(f)
    for k, (start, limit, stride) in enumerate(cuts):
        if (start, limit, stride) == (0, f.shape[k], 1):
            continue
        major, minor = f.axes[k][0], f.size(f.axes[k][1:])  # whole blocks of an axis of several letters
        if start % minor or limit % minor or (minor > 1 and stride != 1):
            return None
        cut = functools.partial(_slice_axis, start=start // minor, limit=limit // minor, stride=stride)
        f = map_index(f, major, cut, base.shape[k] // minor)
    return [dataclasses.replace(f, base=base)]


def _slice_axis(a: jax.Array, axis: int, *, start: int, limit: int, stride: int) -> jax.Array:
    return lax.slice_in_dim(a, start, limit, stride, axis)


def pad(ctx: Context, eqn: Any, f: Value, value: Value) -> list[Value] | None:
    """Padding belongs to the base; the update is zero there."""
    if not isinstance(f, AdaptedWeight) or isinstance(value, AdaptedWeight):
        return None
    (base,) = _deferred.bind(eqn, f.base, value)
    f = merge_indices(f)
    for k, config in enumerate(eqn.params["padding_config"]):
        if tuple(config) != (0, 0, 0):
            if len(f.axes[k]) > 1:
                return None
            f = _pad_letter(f, f.axes[k], config, base.shape[k])
    return [dataclasses.replace(f, base=base)]


def _pad_letter(f: AdaptedWeight, name: str, config: tuple[int, int, int], size: int) -> AdaptedWeight:
    """Pads networks with zeros and gains with ones; what is the same along the letter has to say where it ends."""
    old = f.index(name).size

    def marked(n: TensorNetwork) -> TensorNetwork:
        if any(name in t for t in n.terms):
            return n
        return dataclasses.replace(n, factors=(*n.factors, jnp.ones(old, n.factors[0].dtype)), terms=(*n.terms, name))

    def spread(scale: AxisScale) -> AxisScale:
        if name in scale.indices:
            return scale
        return AxisScale(jnp.broadcast_to(scale.vector, (old, *scale.vector.shape)), name + scale.indices)

    def pad_with(value: int, a: jax.Array, axis: int) -> jax.Array:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        return lax.pad(a, jnp.asarray(value, a.dtype), [config if k == axis else (0, 0, 0) for k in range(a.ndim)])

    networks = tuple(marked(n).map(name, functools.partial(pad_with, 0)) for n in f.networks)
    gains = tuple(spread(g).map(name, functools.partial(pad_with, 1)) for g in f.axis_scales)
    letters = tuple(x._replace(size=size) if x.name == name else x for x in f.indices)
    return dataclasses.replace(f, networks=networks, axis_scales=gains, indices=letters)


def concatenate(ctx: Context, eqn: Any, *values: Value) -> list[Value] | None:
    """Weights side by side (a fused projection): each network is padded with zeros to the joint size."""
    values = tuple(merge_indices(v) if isinstance(v, AdaptedWeight) else v for v in values)
    if any(not f.is_matrix or any(len(a) > 1 for a in f.axes) for f in values if isinstance(f, AdaptedWeight)):
        return None
    (base,) = _deferred.bind(eqn, *(v.base if isinstance(v, AdaptedWeight) else v for v in values))
    return [_side_by_side(values, base, eqn.params["dimension"])]


def stack(ctx: Context, eqn: Any, *values: Value) -> list[Value] | None:
    values = tuple(merge_indices(v) if isinstance(v, AdaptedWeight) else v for v in values)
    if any(not f.is_matrix or any(len(a) > 1 for a in f.axes) for f in values if isinstance(f, AdaptedWeight)):
        return None
    (base,) = _deferred.bind(eqn, *(v.base if isinstance(v, AdaptedWeight) else v for v in values))
    at = eqn.params["axis"]
    return [_side_by_side([_expanded(v, at) for v in values], base, at)]


def _expanded(v: Value, at: int) -> Value:
    """The weight with an axis of size one; of its base the shape alone."""
    if not isinstance(v, AdaptedWeight):
        return jnp.expand_dims(v, at)
    name = fresh_indices([v.used()])
    shape = jax.ShapeDtypeStruct((*v.shape[:at], 1, *v.shape[at:]), v.dtype)
    return relabel(v, shape, [*v.axes[:at], name, *v.axes[at:]], [Index(name, 1)])


def _side_by_side(values: Sequence[Value], base: jax.Array, axis: int) -> AdaptedWeight:
    start, parts = 0, []
    for v in values:
        size = v.shape[axis]
        if isinstance(v, AdaptedWeight):
            config = (start, base.shape[axis] - start - size, 0)
            parts.append(_pad_letter(v, v.axes[axis], config, base.shape[axis]))
        start += size
    return join(parts, base)


def join(weights: list[AdaptedWeight], base: jax.Array) -> AdaptedWeight:
    """One weight with the networks of several, whose axes are of one letter and one size each."""
    first = weights[0]
    networks, gains, origins = list(first.networks), list(first.axis_scales), {x.name: x.origins for x in first.indices}
    for f in weights[1:]:
        ranks = [c for c in dict.fromkeys(f.used()) if c not in f.axes]
        apart = fresh_indices([f.used(), first.used()], len(ranks) + len(f.axes))
        f = rename_indices(f, dict(zip([*ranks, *f.axes], apart, strict=True)))
        f = rename_indices(f, dict(zip(f.axes, first.axes, strict=True)))
        networks += f.networks
        gains += f.axis_scales
        for x in f.indices:
            origins[x.name] = (*origins[x.name], *x.origins)
    letters = tuple(Index(c, n, origins[c]) for c, n in zip(first.axes, base.shape, strict=True))
    paths = tuple(dict.fromkeys(p for f in weights for p in f.paths))
    return AdaptedWeight(base, tuple(networks), first.axes, letters, paths, axis_scales=tuple(gains))


def add(ctx: Context, eqn: Any, left: Value, right: Value) -> list[Value] | None:
    """The sum of two weights, or of a weight and what carries no update, which then belongs to the base."""
    if not (isinstance(left, AdaptedWeight) and isinstance(right, AdaptedWeight)):
        return _add_to_base(eqn, left, right)
    if left.shape != right.shape or left.gathered_axes or right.gathered_axes or left.axis_scales or right.axis_scales:
        return None
    left, right = merge_indices(left), merge_indices(right)
    if any(len(a) > 1 for a in (*left.axes, *right.axes)) or not (left.is_matrix and right.is_matrix):
        return None
    if eqn.primitive.name == "sub":
        right = _scaled(right, -1.0)
    base = _deferred.bind(eqn, left.base, right.base)[0]
    return [join([left, right], base)]


def _add_to_base(eqn: Any, left: Value, right: Value) -> list[Value] | None:
    f = left if isinstance(left, AdaptedWeight) else right
    if f.is_dense:  # it costs nothing to form
        return None
    if not f.is_matrix or f.gathered_axes or f.axis_scales or eqn.outvars[0].aval.shape != f.shape:
        return None
    (base,) = _deferred.bind(eqn, *(v.base if v is f else v for v in (left, right)))
    f = _scaled(f, -1.0) if eqn.primitive.name == "sub" and f is right else f
    return [dataclasses.replace(f, base=base)]


def mul(ctx: Context, eqn: Any, left: Value, right: Value) -> list[Value] | None:
    """A weight times a scalar, or times a vector along some of its axes: one more factor."""
    f, v = (left, right) if isinstance(left, AdaptedWeight) else (right, left)
    if isinstance(v, AdaptedWeight) and isinstance(f, AdaptedWeight):
        f, v = (f, v) if len(_wide(f)) > len(_wide(v)) else (v, f)
        v = _scale(ctx, eqn, f, v)
    if v is None or (eqn.primitive.name == "div" and f is right) or not f.is_matrix:
        return None
    (base,) = _deferred.bind(eqn, *((f.base, v) if f is left else (v, f.base)))
    shape = jax.typeof(v).shape
    if base.shape != f.shape or not jnp.issubdtype(jax.typeof(v).dtype, jnp.floating):
        return None
    f = merge_indices(f)
    along = [k for k, n in enumerate(shape) if n > 1]
    if along and (f.gathered_axes or len(along) == len(_wide(f))):
        return None
    term = "".join(f.axes[k] for k in along)
    vector = jnp.asarray(v).reshape([f.index(c).size for c in term])

    def network(n: TensorNetwork) -> TensorNetwork:
        factor = vector.astype(n.factors[0].dtype)
        factor = 1 / factor if eqn.primitive.name == "div" else factor
        if not term:  # a scalar goes into the first factor: no product of its own
            return dataclasses.replace(n, factors=(n.factors[0] * factor, *n.factors[1:]))
        return dataclasses.replace(n, factors=(*n.factors, factor), terms=(*n.terms, term))

    return [dataclasses.replace(f, base=base, networks=tuple(map(network, f.networks)))]


def _wide(f: AdaptedWeight) -> list[int]:
    return [k for k, n in enumerate(f.shape) if n > 1]


def _scale(ctx: Context, eqn: Any, f: AdaptedWeight, v: AdaptedWeight) -> jax.Array | None:
    """A scale that is a parameter itself, which costs nothing to form; None for a second matrix."""
    if len(_wide(v)) >= len(_wide(f)) or not v.is_dense:
        return None
    ctx.record(eqn, v, {}, factored=False, added=v.base.size if v.networks else 0)
    return dense(v)


def neg(ctx: Context, eqn: Any, f: AdaptedWeight) -> list[Value] | None:
    return [dataclasses.replace(_scaled(f, -1.0), base=_deferred.bind(eqn, f.base)[0])]


def _scaled(f: AdaptedWeight, factor: float) -> AdaptedWeight:
    return dataclasses.replace(f, networks=tuple(dataclasses.replace(n, scale=n.scale * factor) for n in f.networks))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "copy",
            "copy_p",
            "stop_gradient",
            "sharding_constraint",
            "layout_constraint",
            "name",
            "reduce_precision",
            "pvary",
            "pcast",
        ),
        unchanged,
    ),
    "reshard": reshard,
    "device_put": device_put,
    "convert_element_type": convert_element_type,
    "stop_gradient": stop_gradient,
    "optimization_barrier": optimization_barrier,
    "transpose": transpose,
    "squeeze": squeeze,
    "reshape": reshape,
    "broadcast_in_dim": broadcast_in_dim,
    "tile": tile,
    "all_gather": all_gather,
    "rev": rev,
    "slice": slice_,
    "split": split,
    "pad": pad,
    "concatenate": concatenate,
    "stack": stack,
    "add": add,
    "sub": add,
    "mul": mul,
    "div": mul,
    "neg": neg,
}
