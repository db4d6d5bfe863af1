"""Tables as text and HTML, and what `print` and notebooks show as one."""

import abc
import dataclasses
import html
from collections.abc import Collection, Sequence


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a line of text below it.

    Arguments:
        head: the names of the columns.
        rows: the cells of every row.
        right: the columns that are aligned to the right.
        foot: the line of text.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: Collection[int] = ()
    foot: str = ""

    def text(self) -> str:
        """The table in plain text: aligned columns under a ruled head."""
        widths = [max(len(row[k]) for row in (self.head, *self.rows)) for k in range(len(self.head))]

        def line(row: Sequence[str]) -> str:
            pairs = zip(row, widths, strict=True)
            return "  ".join(c.rjust(w) if k in self.right else c.ljust(w) for k, (c, w) in enumerate(pairs)).rstrip()

        lines = [line(self.head), "  ".join("-" * w for w in widths), *map(line, self.rows)]
        return "\n".join([*lines, self.foot] if self.foot else lines)

    def html(self) -> str:
        """The table as HTML, for notebooks."""

        def row(cells: Sequence[str], tag: str) -> str:
            sides = ["right" if k in self.right else "left" for k in range(len(cells))]
            pairs = zip(cells, sides, strict=True)
            return (
                "<tr>" + "".join(f'<{tag} style="text-align: {s}">{html.escape(c)}</{tag}>' for c, s in pairs) + "</tr>"
            )

        body = "\n".join(row(cells, "td") for cells in self.rows)
        foot = f"\n<p>{html.escape(self.foot)}</p>" if self.foot else ""
        return f"<table>\n<thead>{row(self.head, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>{foot}"


class Tabular(abc.ABC):
    """What `print` and notebooks show as a table."""

    @abc.abstractmethod
    def _table(self) -> Table: ...

    def __str__(self) -> str:
        return self._table().text()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self._table().html()
