"""The update of one weight as a module beside the weight: `Factors`."""

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx

from jlora._adapter.dropout import with_key
from jlora._compat import is_tracer
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import expand
from jlora.methods._sharing import group_of

_PLACEMENT = ("hijax", "ref", "eager_sharding", "sharding_rules", "mesh")

OnDense = Literal["warn", "error", "allow"]


class FrozenFactor(nnx.Variable[Any]):
    """An array of an update that is not trained: a frozen factor, or the factors at initialisation."""


class Factors(nnx.Module):
    """The factors of one weight: the attribute `kernel_lora` of the module that has the Param `kernel`.

    Arguments:
        update: the `jlora.Update`, of arrays. The module holds it with an `nnx.LoRAParam` in the place of each
            trainable array, and a `FrozenFactor` in that of each other one.
        weight: the Variable of the weight, whose sharding metadata the factors get.
        on_dense: as for `jlora.adapt`.
        rngs: has the keys for dropout of the low-rank branch; needed if the method has dropout.
        path: of the weight, for errors.

    Attributes:
        deterministic: whether nothing is dropped, if the method has dropout. `train()`, `eval()` and
            `nnx.view` set it.

    Raises:
        ValueError: if the method has dropout and there are no `rngs`; if the layers of a stack share arrays.
    """

    def __init__(
        self,
        update: Update,
        weight: nnx.Variable[Any],
        on_dense: OnDense = "warn",
        rngs: nnx.Rngs | None = None,
        path: str = "",
    ) -> None:
        if update.method.shared_arrays and "stack" in update.roles:
            raise ValueError(
                f"{path} is a stack, whose layers share arrays by {update.method}, and a transformation of "
                "NNX would slice it by layers. Adapt the module's function by jlora.adapt."
            )
        self.on_dense: OnDense = on_dense
        if update.method.is_random:
            if rngs is None:
                raise ValueError(f"{update.method} is random in training, which needs keys: pass rngs=nnx.Rngs(...).")
            self.deterministic = False
            self.rngs = rngs["dropout"].fork()
        self.update = nnx.data(_as_variables(update, weight))

    def get(self, weight: Any) -> Update:
        """The update, of arrays.

        Arguments:
            weight: the array of the weight. If a transformation took one layer of a stacked module, so that it has
                fewer axes than the update was initialised for, the update is that of the layer.
        """
        arrays = jax.tree.map(lambda v: v.get_raw_value(), self.update, is_leaf=is_variable)
        return _of_layer(arrays, tuple(weight.shape))

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches dropout of the low-rank branch for `nnx.view`.

        Arguments:
            deterministic: whether nothing is dropped; None leaves it as it is.
        """
        if deterministic is not None and hasattr(self, "deterministic"):
            self.deterministic = deterministic

    def next(self, path: str, weight: Any) -> Update:
        """The update for one call, with a new key if the method has dropout and is not deterministic.

        Arguments:
            path: of the weight.
            weight: as for `get`.
        """
        update = self.get(weight)
        return update if getattr(self, "deterministic", True) else with_key(update, path, self.rngs())


def with_shared_variables(factors: dict[str, Factors]) -> dict[str, Factors]:
    """Gives all weights that share arrays the same Variables for them, so that each trains alone and in any module.

    Arguments:
        factors: by path, each with Variables of its own.
    """
    first: dict[Method, Update] = {}
    for path in sorted(factors):
        update = factors[path].update
        holder = first.setdefault(group_of(update), update)
        for group in ("factors", "frozen", "initial"):
            arrays, others = getattr(update, group), getattr(holder, group)
            arrays.update({name: others[name] for name in update.method.shared_arrays if name in arrays})
    return factors


def is_variable(node: Any) -> bool:
    """Whether a node is an `nnx.Variable`."""
    return isinstance(node, nnx.Variable)


def _as_variables(update: Update, weight: nnx.Variable[Any]) -> Any:
    """The update with a Variable in the place of each array."""
    metadata, declared = weight.get_metadata(), update.declared
    kept = {name: metadata[name] for name in _PLACEMENT if name in metadata}

    def variable(keys: Any, array: Any) -> nnx.Variable[Any]:
        field, name = keys[0].name, str(getattr(keys[-1], "key", ""))
        kind = nnx.LoRAParam if field == "factors" else FrozenFactor
        if metadata.get("out_sharding") is None or name not in declared:
            return kind.from_metadata(array, kept)
        names = _along(metadata["out_sharding"], expand(declared[name], update.axes), len(update.shape))
        if is_tracer(array) and (kept.get("mesh") or not jax.sharding.get_abstract_mesh().empty):
            return kind(array, **kept, out_sharding=names)  # Flax constrains the array, as it did the weight
        return kind.from_metadata(array, {**kept, "out_sharding": names})

    return jax.tree_util.tree_map_with_path(variable, dataclasses.replace(update, key=None))


def _along(sharding: Any, axes: tuple[int | str, ...], ndim: int) -> Any:
    """The sharding annotation of a factor: that of the weight, along the axes that both have.

    Arguments:
        sharding: the annotation of the weight: names of axes, a `PartitionSpec`, or a sharding.
        axes: for each axis of the factor the number of the weight's axis, or a name if the weight has no such axis.
        ndim: the number of the weight's axes.
    """
    sharding = getattr(sharding, "sharding", sharding)  # of a jax.experimental.layout.Format
    spec = getattr(sharding, "spec", sharding)
    entries = (*spec, *[None] * (ndim - len(spec)))
    names = tuple(entries[axis] if isinstance(axis, int) else None for axis in axes)
    if isinstance(sharding, jax.sharding.NamedSharding):
        return sharding.update(spec=jax.sharding.PartitionSpec(*names))
    return jax.sharding.PartitionSpec(*names) if isinstance(spec, jax.sharding.PartitionSpec) else names


def _of_layer(update: Update, shape: tuple[int, ...]) -> Update:
    """The update without as many stack axes as the weight has fewer axes."""
    missing = len(update.shape) - len(shape)
    stack = [axis for axis, role in enumerate(update.roles) if role == "stack"][:missing]
    if missing <= 0 or len(stack) < missing:
        return update
    roles = tuple(role for axis, role in enumerate(update.roles) if axis not in stack)
    return dataclasses.replace(update, roles=roles, shape=shape)
