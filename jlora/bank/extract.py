"""Extraction: the difference of two checkpoints as an adapter."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._adapter.change import matrix_sizes
from jlora._adapter.svd import Cut, Index, Pair
from jlora._adapter.targets import Targets, select_methods
from jlora._adapter.to_lora import decompose, lora_update
from jlora._interpreter.context import matrix_side
from jlora._interpreter.site import Site
from jlora._ir.materialize import accumulation_dtype
from jlora._trace.sites import Sites
from jlora._tree.leaves import layer_of
from jlora._tree.paths import closest_matches, is_array, named_leaves
from jlora.methods._base import Adapter, Method, Update
from jlora.methods.full import Full
from jlora.methods.lora import LoRA


def extract(
    base: Any,
    tuned: Any,
    sites: Sites,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Targets | None = None,
) -> tuple[Adapter, dict[str, float]]:
    """Makes an adapter of the difference of two checkpoints: the nearest LoRA to it, a layer at a time.

        tuned - base ~ A B,    A = U sqrt(S), B = sqrt(S) V^T,  of the leading singular values of tuned - base

    Weights that low rank cannot adapt (biases, norms) and that differ become `Full`, exactly, so that no difference is
    lost without notice. Weights that are equal in both checkpoints get no update. The difference is computed and
    decomposed in float64 on the host, one layer of one weight in memory at a time.

    Arguments:
        base: the base parameters, quantised or not. Of a quantised base the difference has the error of its rounding.
        tuned: the same parameters after training, with the same paths and shapes.
        sites: from `jlora.trace`, for the roles of the axes.
        rank: the rank of every LoRA, at most that of the weight.
        energy: the share of the squared Frobenius norm of the difference to keep in every layer, in (0, 1]: the lowest
            rank that does, at most `rank`. Pass one of the two, or `targets`.
        targets: instead of both, as for `jlora.init`: a `LoRA` of some rank, `Full`, or None for each weight.
            Differences of weights that no pattern selects are left out, and have the error 1.

    Returns:
        the adapter, and for every path that differs the relative error in the Frobenius norm, of a stack that of its
        worst layer.

    Raises:
        TypeError: if `sites` is not from `jlora.trace`, or a target is not `LoRA`, `Full` or None.
        ValueError: if neither a rank nor an energy nor targets are given, or both; if paths or shapes differ; if an
            integer parameter differs; if a pattern is not valid, or a target cannot adapt its weight.

    Example:
        adapter, errors = jlora.extract(base, tuned, jlora.trace(model.apply, base, x), rank=16)
    """
    if not isinstance(sites, Sites):
        raise TypeError(f"`sites` must come from jlora.trace, not {type(sites).__name__}.")
    if (rank is None and energy is None) == (targets is None):
        raise ValueError("Pass a rank or an energy for all weights, or targets with a method for each pattern.")
    before, after = _leaves(base, tuned, sites)
    cut = Cut(rank, energy)
    methods = None if targets is None else _methods(sites, targets)
    adapter, errors = {}, {}
    for path, site in sites.items():
        pair = before[path], after[path]
        if _are_equal(*pair, site):
            continue
        if methods is not None and path not in methods:
            errors[path] = 1.0
            continue
        method = None if methods is None else methods[path]
        adapter[path], errors[path] = _difference(path, site, *pair, method, cut)
    return adapter, errors


def _leaves(base: Any, tuned: Any, sites: Sites) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of both checkpoints by path, after a check that they are those of the sites."""
    before, after = ({path: a for path, a in named_leaves(tree) if is_array(a)} for tree in (base, tuned))
    misfits = [*_misfits("base", before, sites), *_misfits("tuned", after, sites)]
    if misfits:
        raise ValueError(
            "The checkpoints do not fit. Pass two of one program, and the sites that were traced with them:\n  "
            + "\n  ".join(misfits)
        )
    return before, after


def _misfits(name: str, leaves: Mapping[str, Any], sites: Sites) -> Iterator[str]:
    """Why parameters are not those of the sites, one line for each path."""
    for path, site in sites.items():
        if path not in leaves:
            yield f"{path}: not in `{name}` ({closest_matches(path, leaves)})"
        elif tuple(leaves[path].shape) != site.shape:
            yield f"{path}: shape {tuple(leaves[path].shape)} in `{name}`, {site.shape} in `sites`"
    yield from (f"{path}: in `{name}`, but not in `sites`" for path in leaves if path not in sites)


def _methods(sites: Sites, targets: Targets) -> dict[str, Method]:
    """The method of every path that the targets select."""
    selected = select_methods(sites, targets)
    for path, method in selected.items():
        if not isinstance(method, LoRA | Full):
            raise TypeError(f"A target of jlora.extract is jlora.LoRA(rank), jlora.Full() or None, not {method!r}.")
        kept = method.without_init_fields()
        if kept.offset:
            raise ValueError(
                f"{path}: an extracted update has no start of its own; pass LoRA without offset and start."
            )
        is_floating = jnp.issubdtype(sites[path].dtype, jnp.floating)
        reason = "" if isinstance(method, Full) and is_floating else method.unsupported_reason(sites[path])
        if reason:
            raise ValueError(
                f"{path} {sites[path].shape} cannot become {method!r}: {reason}. Pass Full() or None for it."
            )
    return {path: method.without_init_fields() for path, method in selected.items()}


def _are_equal(before: Any, after: Any, site: Site) -> bool:
    if not jnp.issubdtype(site.dtype, jnp.floating):
        return bool(jnp.all(jnp.asarray(before) == jnp.asarray(after)))
    return all(np.array_equal(layer_of(before, position), layer_of(after, position)) for position in _positions(site))


def _positions(site: Site) -> list[dict[int, int]]:
    return [_position(site, index) for index in np.ndindex(*matrix_sizes(site, "stack"))] if site.roles else [{}]


def _position(site: Site, index: Index) -> dict[int, int]:
    """The position along each stack axis."""
    stack = [axis for axis, role in enumerate(site.roles) if role == "stack"]
    return dict(zip(stack, index, strict=True))


def _difference(
    path: str, site: Site, before: Any, after: Any, method: Method | None, cut: Cut
) -> tuple[Update, float]:
    """The difference of one weight as an update, and its relative error."""
    if not jnp.issubdtype(site.dtype, jnp.floating):
        raise ValueError(
            f"{path} differs, and an adapter cannot change a parameter of dtype {site.dtype}. Pass targets that "
            "exclude it, or the same values."
        )
    if isinstance(method, Full) or (method is None and site.unsupported_reason):
        value = _subtract(before, after, {}).astype(accumulation_dtype(site.dtype))
        return Update({"d": jnp.asarray(value)}, Full(), site.roles, site.shape), 0.0

    sides = [matrix_side(role) for role in site.roles if role != "stack"]
    order = sorted(range(len(sides)), key=lambda axis: sides[axis] == "out")  # stable: in axes, then out axes

    def layer(index: Index) -> np.ndarray:
        value = _subtract(before, after, _position(site, index))
        return value.transpose(order).reshape(math.prod(site.sizes("in")), -1)

    cut = Cut(method.rank) if isinstance(method, LoRA) else cut
    pair, error = decompose(path, site, layer, cut, accumulation_dtype(site.dtype), "the difference")
    return _as_method(pair, site, method), error


def _subtract(before: Any, after: Any, position: Mapping[int, int]) -> np.ndarray:
    return layer_of(after, position).astype(np.float64) - layer_of(before, position).astype(np.float64)


def _as_method(pair: Pair, site: Site, method: Method | None) -> Update:
    """A LoRA of the pair's value, with the hyper-parameters of a method if one is given."""
    if not isinstance(method, LoRA):
        return lora_update(pair, 1.0, site)
    a, b = pair
    root = math.sqrt(abs(method.scale))
    update = lora_update((a / root, b / math.copysign(root, method.scale)), 1.0, site)
    frozen = {name: update.factors[name] for name in method.frozen}
    factors = {name: array for name, array in update.factors.items() if name not in frozen}
    return dataclasses.replace(update, method=method, factors=factors, frozen=frozen)
