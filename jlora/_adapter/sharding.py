"""Shardings of an adapter's arrays, derived from those of the adapted weights."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jlora._tree.leaves import sharding
from jlora._tree.paths import is_array, named_leaves
from jlora._tree.pieces import num_shards
from jlora.methods._base import Adapter, Update
from jlora.methods._common.factor_axes import expand
from jlora.methods._common.layers import layer_axis
from jlora.methods._lowering import check_fits


def shardings(adapter: Adapter, params: Any) -> Any:
    """Derives the sharding of every array of an adapter from that of its weight.

    An axis of a factor that is one of the weight's in, out or stack axes is sharded as that axis is, and so are the
    blocks of `BDLoRA` if the devices along that axis divide their number; ranks and all other axes are replicated over
    the weight's devices.

    Arguments:
        adapter: the adapter, of arrays or of `jax.ShapeDtypeStruct`.
        params: the base parameters, of either kind too. A NumPy array counts as placed on the default device.

    Returns:
        a tree of the adapter's structure with a sharding for every leaf: for `jax.device_put(adapter, shardings)`,
        and for `jax.jit(..., out_shardings=shardings)`.

    Raises:
        ValueError: if the adapter does not fit the parameters, with every misfit.

    Example:
        init = lambda: jlora.init(key, sites, jlora.LoRA(rank=8))
        adapter = jax.jit(init, out_shardings=jlora.shardings(jax.eval_shape(init), params))()
    """
    leaves = {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}
    check_fits([adapter], leaves)
    return {path: _of_update(update, sharding(leaves[path])) for path, update in adapter.items()}


def _of_update(update: Update, weight: Sharding | None) -> Update:
    replicated = _replicated(weight)
    out = jax.tree.map(lambda _: replicated, update)
    if not isinstance(weight, NamedSharding):
        return out
    spec = (*weight.spec, *[None] * (len(update.shape) - len(weight.spec)))
    if update.layers is not None:  # their number need not be divisible
        spec = (*spec[: layer_axis(update)], None, *spec[layer_axis(update) + 1 :])
    own = _divided(update, spec, weight)
    axes = {name: expand(declared, update.axes) for name, declared in update.declared.items()}

    def of_arrays(arrays: Mapping[str, Any]) -> dict[str, Any]:
        return {name: along(axes[name]) if name in axes else replicated for name in arrays}

    def along(entries: tuple[int | str, ...]) -> NamedSharding:
        parts = PartitionSpec(*(spec[entry] if isinstance(entry, int) else own.get(entry) for entry in entries))
        return NamedSharding(weight.mesh, parts, memory_kind=weight.memory_kind)

    return dataclasses.replace(
        out, factors=of_arrays(update.factors), frozen=of_arrays(update.frozen), initial=of_arrays(update.initial)
    )


def _divided(update: Update, spec: tuple[Any, ...], weight: NamedSharding) -> dict[str, Any]:
    """The mesh axes of those axes of the method that number parts of one of the weight's axes."""
    axes, sizes, own = update.axes, update.method.sizes(update.axes), {}
    for name, group in update.method.divided_axes(axes).items():
        entry = spec[axes.axes(group)[0]]
        is_even = entry is not None and sizes[name] % num_shards(entry, weight.mesh) == 0
        own |= {name: entry} if is_even else {}
    return own


def _replicated(weight: Sharding | None) -> Sharding:
    if weight is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(weight, NamedSharding):
        return NamedSharding(weight.mesh, PartitionSpec(), memory_kind=weight.memory_kind)
    if len(weight.device_set) == 1:
        return weight
    devices = sorted(weight.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
