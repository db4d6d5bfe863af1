"""Which weights of an adapted program stay factored, and what that costs: `explain`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jlora._interpreter.context import Use
from jlora._interpreter.flops import flops
from jlora._trace.stage import stage
from jlora._trace.trace import collect_uses
from jlora._tree.repeated_layers import fold_layers
from jlora._tree.short_forms import short_count, short_integer, short_share
from jlora._tree.tables import Table, Tabular
from jlora.methods._lowering import Adapters, as_adapters, check_fits


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation(Tabular):
    """Every use of the adapted weights, factored or dense.

    `print` and notebooks show a table. Layers that differ in their number alone are one row, with the sums of their
    FLOPs and bytes.

    Arguments:
        uses: the uses.
        flops: FLOPs of one forward pass of the base program, in products and convolutions; an expression of symbolic
            sizes if the arguments have such.
    """

    uses: tuple[Use, ...]
    flops: float

    @property
    def dense(self) -> tuple[Use, ...]:
        """The uses that materialise the weight."""
        return tuple(use for use in self.uses if not use.factored)

    def _table(self) -> Table:
        rows = []
        for path, positions in fold_layers([(use.path, dataclasses.replace(use, path="")) for use in self.uses]):
            use, count = self.uses[positions[0]], len(positions)
            numbers = (
                short_count(count * use.flops),
                short_count(count * use.added),
                "" if use.factored else short_integer(count * use.bytes),
            )
            rows.append((path, str(count), use.primitive, use.form, *numbers, use.why, use.where))
        head = ("path", "uses", "primitive", "form", "base FLOPs", "added FLOPs", "dense bytes", "why", "where")
        added = sum(use.added for use in self.uses)
        of_base = f"of the base's {short_count(self.flops)}"
        share = f" ({short_share(added, self.flops, 2)} {of_base})" if self.flops != 0 else ""
        foot = f"{len(self.uses)} uses, {len(self.dense)} dense; the adapter adds {short_count(added)} FLOPs{share}"
        return Table(head, rows, right=(1, 4, 5, 6), foot=foot)


def explain(fun: Callable[..., Any], params: Any, adapter: Adapters, /, *args: Any, **kwargs: Any) -> Explanation:
    """Lists every use of an adapted weight: whether the weight stays factored there, and what that costs.

    Nothing is computed, so all arrays may be `jax.ShapeDtypeStruct`.

    Arguments:
        fun: the base program, as for `jlora.adapt`.
        params: the base parameters.
        adapter: the adapter, or several.
        args, kwargs: as for `fun`.

    Returns:
        the uses, with the FLOPs of the base program. `print` shows them as a table.

    Raises:
        TypeError: if `adapter` is not an adapter or a list of adapters, or `fun` is adapted already.
        ValueError: if the adapter does not fit the parameters.
    """
    adapters = as_adapters(adapter)
    if getattr(fun, "is_adapted_by_jlora", False):
        raise TypeError(
            "This function is adapted: explain the base function, jlora.explain(f, params, adapter, *args)."
        )
    program = stage(fun, params, args, kwargs)
    check_fits(adapters, dict(zip(program.paths, program.params, strict=True)))
    return Explanation(tuple(collect_uses(program, adapters)), flops(program.jaxpr))
