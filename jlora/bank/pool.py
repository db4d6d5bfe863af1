"""A pool: a fixed number of adapters on the device, any number of them on the host or on disk."""

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._tree.paths import closest_matches
from jlora.bank import bank as banks
from jlora.bank.bank import Bank
from jlora.methods._base import Adapter

Source = Mapping[str, Adapter] | Callable[[str], Adapter] | str | os.PathLike[str]


class Pool:
    """Serves more adapters than the device has room for.

    The device holds a bank with a fixed number of slots. `put` keeps an adapter on the host; `ids` and `use` copy
    those that a batch needs into slots, in the place of those that were used least recently. All copies run one
    compiled program that reuses the buffers of the bank, and programs that use the bank are never compiled again.

    A pool may be used from several threads. Take the bank and the ids together, by `use`: another thread may replace
    what is in a slot, and its copy invalidates banks that were taken before.

    Arguments:
        like: an adapter or a bank that has the weights, the methods and the highest ranks of all adapters.
        slots: how many adapters the device holds.
        source: where adapters are read that were not `put`: a mapping, a function of the name, which raises KeyError
            for an unknown one, or the folder of a saved bank.
        params: the base parameters, for methods that depend on them.
        shardings: of the bank, from `jlora.bank.shardings(pool.bank, params)`; None places it on the default device.

    Raises:
        ValueError: if there is no slot.

    Example:
        pool = jlora.bank.Pool(like=jlora.init(key, sites, jlora.LoRA(rank=16)), slots=64, source="adapters/")
        with pool.use(["films", None, "tweets"]) as (bank, ids):
            logits = apply(params, bank, ids, tokens)

    Sheng et al. 2023, S-LoRA: Serving Thousands of Concurrent LoRA Adapters, arXiv:2311.03285.
    """

    def __init__(
        self,
        like: Adapter | Bank,
        slots: int,
        *,
        source: Source | None = None,
        params: Any = None,
        shardings: Bank | None = None,
    ) -> None:
        if slots < 1:
            raise ValueError(f"A pool has at least one slot, not {slots}.")
        one = like if isinstance(like, Bank) else banks.stack({"like": like})
        empty = banks.as_member({}, one.adapter, "an empty slot")
        adapter = jax.tree.map(lambda array: jnp.repeat(array[None], slots, axis=0), empty)
        self._bank = Bank(adapter, tuple(map(str, range(slots))))
        if shardings is not None:
            self._bank = jax.device_put(self._bank, shardings)
        self._params = params
        self._source = _reader(source)
        self._host: dict[str, Adapter] = {}
        self._places: OrderedDict[str, int] = OrderedDict()  # names in slots, the least recently used first
        self._lock = threading.RLock()

    @property
    def bank(self) -> Bank:
        """The bank of the slots. The next copy into a slot invalidates it."""
        return self._bank

    @property
    def slots(self) -> int:
        """How many adapters the device holds."""
        return len(self._bank)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots on the device."""
        return sum(array.nbytes for array in jax.tree.leaves(self._bank))

    @property
    def resident(self) -> list[str]:
        """The names in slots, the least recently used first."""
        with self._lock:
            return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._host or name in self._places

    def __repr__(self) -> str:
        return (
            f"Pool({len(self._places)} of {self.slots} slots in use, {len(self._host)} adapters on the host, "
            f"{self.nbytes / 2**20:.1f} MiB on the device)"
        )

    def put(self, name: str, adapter: Adapter) -> None:
        """Adds an adapter on the host, or replaces one; if it is in a slot, the slot changes too.

        Raises:
            ValueError: if it does not have the form of the pool's slots, or a higher rank.
        """
        member = self._as_member(name, adapter)
        with self._lock:
            self._host[name] = member
            if name in self._places:
                self._write(self._places[name], member)

    def evict(self, name: str | None = None) -> str:
        """Frees a slot: of an adapter, or of the one that was used least recently. It stays on the host.

        Returns:
            the name of the adapter that was in the slot.

        Raises:
            KeyError: if the adapter is in no slot, or no slot is in use.
        """
        with self._lock:
            if name is None and not self._places:
                raise KeyError("No slot is in use.")
            name = next(iter(self._places)) if name is None else name
            if name not in self._places:
                raise KeyError(f"{name!r} is in no slot ({closest_matches(name, self._places)}).")
            del self._places[name]
            return name

    def remove(self, name: str) -> None:
        """Removes an adapter from the host and from its slot.

        Raises:
            KeyError: if the pool does not hold it.
        """
        with self._lock:
            if name not in self:
                raise KeyError(f"The pool holds no adapter {name!r} ({closest_matches(name, self._host)}).")
            self._host.pop(name, None)
            self._places.pop(name, None)

    def ids(self, names: Sequence[str | None]) -> np.ndarray:
        """The slot of every name, (rows,), -1 for None, the base; adapters that are in no slot are copied into one.

        Raises:
            KeyError: if an adapter is neither in the pool nor in its source; then no slot has changed.
            ValueError: if the names are more than the slots.
        """
        with self._lock:
            wanted = list(dict.fromkeys(name for name in names if name is not None))
            if len(wanted) > self.slots:
                raise ValueError(f"{len(wanted)} adapters are asked for at once, and the pool has {self.slots} slots.")
            members = {name: self._find(name) for name in wanted if name not in self._places}
            for name in wanted:
                if name in self._places:
                    self._places.move_to_end(name)
            for name, member in members.items():
                self._write(self._free_slot(keep=wanted), member, name)
            return np.array([-1 if name is None else self._places[name] for name in names], np.int32)

    @contextlib.contextmanager
    def use(self, names: Sequence[str | None]) -> Iterator[tuple[Bank, np.ndarray]]:
        """The bank and the ids of names, which stay valid inside the `with`: other threads wait.

        Start the program inside; its results may be awaited outside.

        Raises:
            KeyError, ValueError: as for `ids`.
        """
        with self._lock:
            ids = self.ids(names)
            yield self._bank, ids

    def _find(self, name: str) -> Adapter:
        if name in self._host:
            return self._host[name]
        try:
            adapter = self._source(name)
        except KeyError as error:
            raise KeyError(
                f"The pool and its source have no adapter {name!r} ({closest_matches(name, self._host)}). Put it first."
            ) from error
        return self._as_member(name, adapter)

    def _as_member(self, name: str, adapter: Adapter) -> Adapter:
        with self._lock:
            return jax.device_get(banks.as_member(adapter, self._bank.adapter, name, self._params))

    def _free_slot(self, keep: Sequence[str]) -> int:
        free = set(range(self.slots)) - set(self._places.values())
        if free:
            return min(free)
        return self._places.pop(next(name for name in self._places if name not in keep))

    def _write(self, slot: int, member: Adapter, name: str | None = None) -> None:
        adapter = _write_in_place(self._bank.adapter, np.int32(slot), member)
        self._bank = Bank(adapter, self._bank.names)
        if name is not None:
            self._places[name] = slot


@functools.partial(jax.jit, donate_argnums=0)
def _write_in_place(stacked: Adapter, slot: Any, member: Adapter) -> Adapter:
    return banks.write_member(stacked, slot, member)


def _reader(source: Source | None) -> Callable[[str], Adapter]:
    if source is None:
        return {}.__getitem__
    if isinstance(source, Mapping):
        return source.__getitem__
    if callable(source):
        return source
    from jlora.bank import checkpoint  # TensorStore takes as long to import as JAX

    return functools.partial(checkpoint.load_member, source)
