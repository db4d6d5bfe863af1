"""The report on a file: `Info`, as text and as JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jlora._adapter.summary import Summary, UpdateSummary
from jlora._tree.short_forms import short_bytes
from jlora._tree.tables import Table, Tabular
from jlora.methods._description import describe_method


class Content(NamedTuple):
    """What a reader of one format finds.

    Arguments:
        updates: what each module or weight holds.
        refused: a sentence for each thing that the format's `load` refuses whatever the program is.
        notes: sentences on what the file leaves open.
    """

    updates: tuple[UpdateSummary, ...]
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, repr=False)
class Info(Tabular):
    """What an adapter file holds. `print` and notebooks show a table; `as_json` gives the same for programs.

    A file of another library has one row for each module, with the shape of torch's weight. Modules that differ only in
    their index share a row, as in `jlora.summary`.

    Arguments:
        path: the file or folder.
        format: its format, such as "PEFT".
        adapters: the summary of each adapter by name: one without a name, or the members of a bank.
        refused: a sentence for each thing that would be refused, whatever the program is; empty if everything loads.
        notes: sentences on what the file leaves open.
    """

    path: str
    format: str
    adapters: Mapping[str, Summary]
    refused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The same as nested dicts and lists of strings and numbers; a norm that is not known is None."""
        return {
            "path": self.path,
            "format": self.format,
            "adapters": {name: _summary_as_json(summary) for name, summary in self.adapters.items()},
            "refused": list(self.refused),
            "notes": list(self.notes),
        }

    def _table(self) -> Table:
        return self._members() if len(self.adapters) != 1 else next(iter(self.adapters.values()))._table()

    def _members(self) -> Table:
        """One row for each member of a bank."""
        rows = []
        for name, summary in self.adapters.items():
            methods = sorted({type(update.method).__name__ for update in summary.updates})
            ranks = sorted({str(update.rank) for update in summary.updates if update.rank is not None})
            norms = [update.norm for update in summary.updates if update.norm is not None]
            norm = f"{math.hypot(*norms):.3g}" if len(norms) == len(summary.updates) else ""
            counts = (f"{len(summary.updates)}", f"{summary.numbers:,}", f"{summary.bytes:,}")
            rows.append((name, ", ".join(methods), ", ".join(ranks), *counts, norm))
        head = ("member", "methods", "ranks", "updates", "numbers", "bytes", "norm")
        total = sum(summary.bytes for summary in self.adapters.values())
        return Table(head, rows, right=range(2, 7), foot=f"{len(rows)} members, {short_bytes(total)}")

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}", self._table().text()]
        for title, sentences in (("Would be refused:", self.refused), ("Notes:", self.notes)):
            lines += [title, *(f"  {sentence}" for sentence in sentences)] if sentences else []
        return "\n".join(lines)


def _summary_as_json(summary: Summary) -> dict[str, Any]:
    updates = [
        {
            "path": update.path,
            "method": type(update.method).__name__,
            "hyperparameters": describe_method(update.method)["hyperparameters"],
            "rank": update.rank,
            "shape": list(update.shape),
            "numbers": update.numbers,
            "bytes": update.bytes,
            "norm": update.norm if update.norm is not None and math.isfinite(update.norm) else None,
        }
        for update in summary.updates
    ]
    return {"updates": updates, "numbers": summary.numbers, "bytes": summary.bytes}
