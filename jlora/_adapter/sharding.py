"""Where an adapter's arrays lie: along the axes of a weight that its own axes follow."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jlora._interpreter.context import Role, Use
from jlora._interpreter.site import Site
from jlora._tree.leaves import sharding
from jlora._tree.paths import is_array, named_leaves
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._lowering import INITIAL_SUFFIX, check_fits


def shardings(adapter: Adapter, params: Any) -> Any:
    """Gives every array of an adapter the sharding that its weight's has for it.

    An axis of a factor that is one of the weight's in, out or stack axes is divided as that axis is; ranks and all
    else are replicated over the weight's devices.

    Arguments:
        adapter: the adapter, of arrays or of `jax.ShapeDtypeStruct`.
        params: the base parameters, of either kind too. A weight that lies nowhere (numpy) means the default device.

    Returns:
        a tree of the adapter's structure with a sharding for every leaf: for `jax.device_put(adapter, shardings)`,
        and for `jax.jit(..., out_shardings=shardings)`.

    Raises:
        ValueError: where the adapter does not fit the parameters, with every misfit.
    """
    leaves = {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}
    check_fits([adapter], leaves)
    return {path: _of(update, sharding(leaves[path])) for path, update in adapter.items()}


def _of(update: Update, weight: jax.sharding.Sharding | None) -> Update:
    rest = _replicated(weight)
    out = jax.tree.map(lambda _: rest, update)
    if not isinstance(weight, NamedSharding):
        return out
    spec = (*weight.spec, *(None for _ in range(len(update.shape) - len(weight.spec))))

    def along(axes: tuple[int | None, ...]) -> NamedSharding:
        parts = PartitionSpec(*(None if axis is None else spec[axis] for axis in axes))
        return NamedSharding(weight.mesh, parts, memory_kind=weight.memory_kind)

    follows = infer_factor_axes(update)
    for group in ("factors", "frozen"):
        arrays = getattr(update, group)
        known = {name: along(follows[name]) for name in arrays if name in follows}
        out = dataclasses.replace(out, **{group: {**getattr(out, group), **known}})
    return out


def _replicated(weight: jax.sharding.Sharding | None) -> jax.sharding.Sharding:
    if weight is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(weight, NamedSharding):
        return NamedSharding(weight.mesh, PartitionSpec(), memory_kind=weight.memory_kind)
    if len(weight.device_set) == 1:
        return weight
    devices = sorted(weight.device_set, key=lambda device: device.id)
    return NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())


def infer_factor_axes(update: Update) -> dict[str, tuple[int | None, ...]]:
    """For every axis of an update's arrays the axis of the weight that it follows, None where there is none.

    It follows the one whose size it has, and with which it grows: the method itself is asked for the arrays of a
    weight that is twice as long.
    """
    shapes = functools.partial(_shapes, update.method, tuple(update.roles))
    before = shapes(update.shape)
    out: dict[str, list[int | None]] = {name: [None] * len(shape) for name, shape in before.items()}
    for axis, size in enumerate(update.shape):
        longer = tuple(n * (1 + (k == axis)) for k, n in enumerate(update.shape))
        for name, shape in shapes(longer).items():
            if name not in before or len(before[name]) != len(shape):  # the longer weight has another form
                continue
            grown = [k for k, (n, m) in enumerate(zip(before[name], shape, strict=True)) if n == size and m == 2 * n]
            if grown and out[name][grown[0]] is None:
                out[name][grown[0]] = axis
    found = {name: tuple(axes) for name, axes in out.items()}
    return found | {name + INITIAL_SUFFIX: axes for name, axes in found.items()}


@functools.lru_cache
def _shapes(method: Method, roles: tuple[Role, ...], shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a method's arrays for a weight of some shape and roles, which the layers of a model share."""
    use = Use("", "dot_general", "", tuple(enumerate(roles)), True, 0, 0, 0)
    site = Site("", shape, np.dtype(np.float32), None, (use,))
    base = jax.ShapeDtypeStruct(shape, np.float32)
    made = jax.eval_shape(lambda key, base: method.init(key, site, np.dtype(np.float32), base), jax.random.key(0), base)
    return {name: tuple(array.shape) for name, array in made.items()}
