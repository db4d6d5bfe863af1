"""A bank: several adapters of one base, whose arrays are stacked along a leading axis."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _compat
from jlora._adapter import sharding
from jlora._adapter.adapt import adapt
from jlora._tree.paths import closest_matches
from jlora.bank import form
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single
from jlora.methods._sharing import check_all_or_none, tie, untie


@functools.partial(jax.tree_util.register_dataclass, data_fields=["adapter"], meta_fields=["names"])
@dataclasses.dataclass(frozen=True)
class Bank:
    """Several adapters of one base as one pytree; `jlora.bank.stack` makes it.

    `bank["films"]` is a member, `len(bank)` their number, and `for name in bank` runs through the names.

    Arguments:
        adapter: an adapter whose arrays have a leading axis of members: ranks are padded with zeros, and the scale of
            every update is an array, (members,), so that another rank or alpha never compiles again.
        names: the names of the members, in the order of the axis.
    """

    adapter: Adapter
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> Adapter:
        """A member: outside of `jit` with its own rank and targets, inside with those of the bank."""
        member = jax.tree.map(lambda array: array[self.position(name)], self.adapter)
        if any(map(_compat.is_tracer, jax.tree.leaves(member))):
            return member
        complete = untie(member)
        return tie({p: form.without_padding(update) for p, update in complete.items() if update.traced_scale != 0})

    def __repr__(self) -> str:
        return f"Bank({len(self)} adapters: {', '.join(self.names)}; {len(self.adapter)} weights)"

    def position(self, name: str) -> int:
        """The place of a member along the leading axis.

        Raises:
            KeyError: if there is no such member, with the names that are close to it.
        """
        if name not in self.names:
            raise KeyError(f"The bank has no adapter {name!r} ({closest_matches(str(name), self.names)}).")
        return self.names.index(name)

    def ids(self, names: Sequence[str | None]) -> np.ndarray:
        """The ids of members for `jlora.bank.apply`, (rows,): the place of each name, -1 for None, the base.

        Raises:
            KeyError: if there is no such member.
        """
        return np.array([-1 if name is None else self.position(name) for name in names], np.int32)

    def replace(self, name: str, adapter: Adapter, params: Any = None) -> "Bank":
        """The bank with another adapter in the place of a member; no program is compiled again.

        Arguments:
            name: of the member.
            adapter: its new value, of at most the bank's rank.
            params: the base parameters, for methods that depend on them.

        Raises:
            KeyError: if there is no such member.
            ValueError: if the adapter has a weight that the bank lacks, or does not have the bank's form.
        """
        member = as_member(adapter, self.adapter, name, params)
        return dataclasses.replace(self, adapter=write_member(self.adapter, self.position(name), member))


def stack(members: Mapping[str, Adapter], *, params: Any = None, rank: int = 0, dropout: float | None = None) -> Bank:
    """Stacks adapters of one base into a bank.

    Members may differ in rank, alpha, targets and method. Ranks are padded with zeros. A weight that a member does not
    adapt gets an update with scale zero. Updates of methods that differ become their exact equal LoRA.

    Arguments:
        members: the adapters by name.
        params: the base parameters, for methods whose equal LoRA depends on them.
        rank: the lowest rank of LoRAs in the bank: room for members that `Bank.replace` puts in later.
        dropout: the dropout rate of all members; None keeps their own, which must be equal.

    Returns:
        the bank.

    Raises:
        TypeError: if `members` is not a mapping of adapters, or a name is not a string.
        ValueError: if there are no members, or they are for different weights, or their dropout differs, or a method
            that differs has no equal LoRA.

    Example:
        bank = jlora.bank.stack({"films": films, "tweets": tweets})
    """
    if not isinstance(members, Mapping) or not all(isinstance(name, str) for name in members):
        raise TypeError(f"jlora.bank.stack takes a dict from names to adapters, not {type(members).__name__}.")
    if members and all(isinstance(update, Update) for update in members.values()):
        raise TypeError("jlora.bank.stack takes a dict from names to adapters, found one adapter: {'name': adapter}.")
    adapters = {name: untie(as_single(adapter)) for name, adapter in members.items()}
    if not any(adapters.values()):
        raise ValueError("There is nothing to stack: pass at least one adapter that is not empty.")
    stacked = {}
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter):
        updates = {name: adapter[path] for name, adapter in adapters.items() if path in adapter}
        updates = form.common_form(path, updates, params=params, dropout=dropout, rank=rank)
        missing = form.absent(next(iter(updates.values())))
        stacked[path] = _stack_updates([updates.get(name, missing) for name in adapters])
    for name, adapter in adapters.items():
        check_all_or_none(name, adapter, stacked)
    return Bank(tie(stacked), tuple(adapters))


def unstack(bank: Bank) -> dict[str, Adapter]:
    """The members of a bank by name, each with its own rank and targets."""
    return {name: bank[name] for name in bank}


def vmap(fun: Callable[..., Any], in_axes: Any = 0, **options: Any) -> Callable[..., Any]:
    """Applies every member of a bank to arguments of its own, at the cost of one adapter on all of them.

        g(params, bank, x)[k] == adapt(f)(params, bank[names[k]], x[k])

    Arguments:
        fun: `fun(params, *args)`, as for `jlora.adapt`.
        in_axes: the axis of members in each of `args`, as for `jax.vmap`; None for arguments that all share.
        options: those of `jlora.adapt`.

    Returns:
        `g(params, bank, *args)`, whose results have a leading axis of members.

    Example:
        losses = jlora.bank.vmap(loss)(params, bank, batches)
    """
    adapted = adapt(fun, **options)

    def mapped(params: Any, bank: Bank, *args: Any) -> Any:
        check_bank(bank)
        axes = in_axes if isinstance(in_axes, (tuple, list)) else (in_axes,) * len(args)
        return jax.vmap(adapted, (None, 0, *axes))(params, bank.adapter, *args)

    return mapped


def check_bank(bank: object) -> None:
    """Raises if what follows the parameters is not a bank.

    Raises:
        TypeError: with its type.
    """
    if not isinstance(bank, Bank):
        raise TypeError(f"Expected a bank after the parameters, found {type(bank).__name__}: use jlora.bank.stack.")


def shardings(bank: Bank, params: Any, *, axis: str | None = None) -> Bank:
    """Derives the sharding of every array of a bank from that of its weight.

    Arguments:
        bank: the bank, of arrays or of `jax.ShapeDtypeStruct`.
        params: the base parameters, of either kind too.
        axis: the mesh axis along which members are placed; None replicates them.

    Returns:
        a bank with a sharding for every leaf, for `jax.device_put` and `jax.jit(..., out_shardings=...)`.

    Raises:
        ValueError: if the bank does not fit the parameters, or `axis` is not an axis of the weights' mesh.
    """

    def with_members(one: Any) -> Any:
        if not isinstance(one, NamedSharding):
            if axis is None:
                return one
            raise ValueError(f"The members can be placed along {axis!r} only if the weights are placed on a mesh.")
        if axis is not None and axis not in one.mesh.axis_names:
            raise ValueError(f"{axis!r} is not an axis of the mesh: {', '.join(map(str, one.mesh.axis_names))}.")
        if axis is not None and axis in jax.tree.leaves(tuple(one.spec)):
            raise ValueError(f"A weight is placed along {axis!r} already: {one.spec}. Choose another axis.")
        return NamedSharding(one.mesh, PartitionSpec(axis, *one.spec), memory_kind=one.memory_kind)

    one = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape[1:], array.dtype), bank.adapter)
    return dataclasses.replace(bank, adapter=jax.tree.map(with_members, sharding.shardings(one, params)))


def as_member(adapter: Adapter, stacked: Adapter, name: str, params: Any = None) -> Adapter:
    """An adapter in the form of a bank's members: equal methods and ranks, every weight of the bank.

    Arguments:
        adapter: the adapter.
        stacked: the bank's arrays, of which only shapes are used.
        name: of the adapter, for errors.
        params: the base parameters, for methods that depend on them.

    Raises:
        ValueError: if the adapter has a weight that the bank lacks, or does not have the bank's form.
    """
    adapter, complete = untie(as_single(adapter)), untie(stacked)
    extra = [path for path in adapter if path not in stacked]
    if extra:
        raise ValueError(
            f"{name} adapts {len(extra)} weights that the bank does not: {', '.join(extra[:3])}. Stack a bank with "
            "these weights."
        )
    check_all_or_none(name, adapter, stacked)
    member = {}
    for path, update in complete.items():
        slot = jax.tree.map(lambda array: jnp.zeros(array.shape[1:], array.dtype), update)
        member[path] = form.member_form(path, name, adapter.get(path), slot, params)
    return tie(member)


@functools.partial(jax.jit, inline=True)
def write_member(stacked: Adapter, position: Any, member: Adapter) -> Adapter:
    """The stacked arrays with a member in another place of the leading axis."""
    return jax.tree.map(lambda array, value: array.at[position].set(value), stacked, member)


def _stack_updates(updates: Iterable[Update]) -> Update:
    def stacked(*arrays: jax.Array) -> jax.Array:
        dtype = jnp.result_type(*arrays)
        return jnp.stack([jnp.asarray(array, dtype) for array in arrays])

    return jax.tree.map(stacked, *map(form.with_array_scale, updates))
