"""What an adapter holds, as a table: `summary`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora._ir.materialize import accumulation_dtype, dense
from jlora._tree.leaves import as_array
from jlora._tree.paths import is_array, named_leaves
from jlora._tree.repeated_layers import fold_layers
from jlora._tree.short_forms import short_bytes
from jlora._tree.tables import Table, Tabular
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._lowering import as_single, check_fits, lower_updates
from jlora.methods._sharing import untie


@dataclasses.dataclass(frozen=True)
class UpdateSummary:
    """One update of a `Summary`.

    Arguments:
        path: the path of the weight.
        method: the method with its hyper-parameters.
        rank: its rank; None if the method does not have a rank.
        shape: the shape of the weight.
        numbers: how many numbers train.
        bytes: the bytes of all arrays of the update, frozen ones included.
        norm: the Frobenius norm of the change, |W' - W|, in float32. None if it cannot be computed: if the arrays are
            abstract, or if the update depends on the weight and `summary` was called without parameters.
    """

    path: str
    method: Method
    rank: int | None
    shape: tuple[int, ...]
    numbers: int
    bytes: int
    norm: float | None


@dataclasses.dataclass(frozen=True, repr=False)
class Summary(Tabular):
    """What an adapter holds. `print` and notebooks show a table.

    Layers that differ only in their index share a row, with the sums of their numbers and bytes and the range of their
    norms.

    Arguments:
        updates: a summary of each update, in the adapter's order.
        base_numbers: how many numbers the base parameters hold; None if they were not given.
    """

    updates: tuple[UpdateSummary, ...]
    base_numbers: int | None = None

    @property
    def numbers(self) -> int:
        """How many numbers train."""
        return sum(update.numbers for update in self.updates)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays that the adapter holds."""
        return sum(update.bytes for update in self.updates)

    def _table(self) -> Table:
        rows = []
        keys = [(u.path, (u.method, u.rank, u.shape, u.numbers, u.bytes)) for u in self.updates]
        for path, positions in fold_layers(keys):
            update, count = self.updates[positions[0]], len(positions)
            name, rank = type(update.method).__name__, "" if update.rank is None else str(update.rank)
            numbers, size = f"{count * update.numbers:,}", f"{count * update.bytes:,}"
            norms = _range([self.updates[k].norm for k in positions])
            rows.append((path, str(count), name, rank, "x".join(map(str, update.shape)), numbers, size, norms))
        head = ("path", "count", "method", "rank", "shape", "numbers", "bytes", "norm")
        base = self.base_numbers
        share = f" ({100 * self.numbers / base:.3g}% of the base's {base:,})" if base else ""
        foot = f"{len(self.updates)} updates, {self.numbers:,} numbers{share}, {short_bytes(self.bytes)}"
        return Table(head, rows, right=(1, 3, 5, 6, 7), foot=foot)


def summary(adapter: Adapter, params: Any = None) -> Summary:
    """Lists what an adapter holds for every weight: method, rank, numbers, bytes, and the norm of the change.

    Arguments:
        adapter: an adapter, which may be abstract (`jax.ShapeDtypeStruct`).
        params: the base parameters, which may be abstract. With them, the table also has the share of trained numbers,
            and the norms of updates that depend on the weight.

    Returns:
        the summary. `print` shows it as a table:

            path                                  count  method  rank  shape    numbers    bytes    norm
            ------------------------------------  -----  ------  ----  -------  -------  -------  ------
            layer_{0..11}/attention/query/kernel     12  LoRA       8  768x768  147,456  589,824  0..0.1
            12 updates, 147,456 numbers (0.17% of the base's 85,054,464), 576 KiB

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if the adapter does not fit the parameters.
    """
    adapter = as_single(adapter)
    leaves = {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}
    if params is not None:
        check_fits([adapter], leaves)
    base_numbers = sum(math.prod(leaf.shape) for leaf in leaves.values()) if params is not None else None
    complete = untie(adapter)
    updates = [_summarize(path, adapter[path], complete[path], leaves.get(path)) for path in adapter]
    return Summary(tuple(updates), base_numbers)


def _summarize(path: str, update: Update, complete: Update, leaf: Any) -> UpdateSummary:
    numbers = sum(math.prod(a.shape) for a in jax.tree.leaves(update.factors))
    arrays = jax.tree.leaves(dataclasses.replace(update, key=None))
    size = sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in arrays)
    rank = getattr(update.method, "rank", None)
    return UpdateSummary(path, update.method, rank, update.shape, numbers, size, _norm(complete, leaf))


def _norm(update: Update, leaf: Any) -> float | None:
    """|W' - W|; without the weight, only if the change does not depend on it."""
    method = update.method
    if leaf is None and (method.depends_on_weight or method.is_multiplicative):
        return None
    if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves((update, leaf))):
        return None
    return float(_norm_of_change(dataclasses.replace(update, key=None), leaf))


@jax.jit
def _norm_of_change(update: Update, leaf: Any) -> jax.Array:
    weight = jnp.zeros(update.shape) if leaf is None else as_array(leaf)
    weight = weight.astype(accumulation_dtype(weight.dtype))
    return jnp.linalg.norm((dense(lower_updates([{"": update}], weight, "")) - weight).reshape(-1))


def _range(norms: list[float | None]) -> str:
    values = sorted({f"{norm:.3g}": norm for norm in norms if norm is not None}.items(), key=lambda item: item[1])
    return "..".join(dict.fromkeys([values[0][0], values[-1][0]])) if values else ""
