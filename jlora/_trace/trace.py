"""What a program does with its weights: `trace` for the base, `explain` for an adapter."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from jlora import _compat
from jlora._interpreter import interpreter as _interpret
from jlora._interpreter.context import Context, Use
from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora._pretty import table
from jlora._trace.flops import flops
from jlora._trace.stage import Program, stage
from jlora._tree.leaves import is_quantized, sharding
from jlora.methods._base import Adapter
from jlora.methods._lowering import Adapters, as_adapters, check_fits, lower_updates


@dataclasses.dataclass(frozen=True)
class Sites(Mapping[str, Site]):
    """Every parameter of a traced program, by path. `print` shows them as a table."""

    sites: dict[str, Site]
    flops: float

    def __getitem__(self, path: str) -> Site:
        return self.sites[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = []
        for site in self.sites.values():
            names = collections.Counter(use.primitive for use in site.uses)
            used = ", ".join(name if n == 1 else f"{name} x{n}" for name, n in names.items())
            axes = ", ".join(f"{r} {n}" for r, n in zip(site.roles, site.shape, strict=True)) if site.roles else ""
            shape = "x".join(map(str, site.shape)) or "scalar"
            share = f"{100 * site.flops / self.flops:.1f}%" if self.flops and site.flops else ""
            verdict = "no: " + site.unsupported_reason if site.unsupported_reason else "yes"
            rows.append((site.path, shape, str(site.dtype), axes, used, share, verdict))
        head = ("path", "shape", "dtype", "axes", "consumed by", "FLOPs", "adaptable")
        count = sum(math.prod(site.shape) for site in self.sites.values())
        good = sum(not site.unsupported_reason for site in self.sites.values())
        foot = (
            f"{len(self.sites)} parameters, {count:,} numbers; {good} can be adapted with low rank; "
            f"a forward pass takes {self.flops:.3g} FLOPs in products"
        )
        return f"{table(head, rows, right=(5,))}\n{foot}"

    __repr__ = __str__


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every use of the adapted weights, factored or formed. `print` shows them as a table.

    Arguments:
        uses: the uses.
        flops: of the base program's forward pass.
    """

    uses: tuple[Use, ...]
    flops: float

    @property
    def dense(self) -> tuple[Use, ...]:
        """The uses that form the weight."""
        return tuple(use for use in self.uses if not use.factored)

    def __str__(self) -> str:
        rows = [
            (
                use.path,
                use.primitive,
                "factored" if use.factored else "dense",
                f"{use.flops:.3g}",
                f"{use.added:.3g}",
                f"{use.bytes:,}" if use.bytes else "",
                use.where,
            )
            for use in self.uses
        ]
        head = ("path", "primitive", "form", "base FLOPs", "added FLOPs", "bytes formed", "where")
        added = sum(use.added for use in self.uses)
        share = f" ({100 * added / self.flops:.2f}% of the base's {self.flops:.3g})" if self.flops else ""
        foot = f"{len(self.uses)} uses, {len(self.dense)} dense; the adapter adds {added:.3g} FLOPs{share}"
        return f"{table(head, rows, right=(3, 4, 5))}\n{foot}"

    __repr__ = __str__


def trace(fun: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Sites:
    """Finds every parameter that a program uses, and how.

    Arguments:
        fun: `fun(params, *args, **kwargs)`, any function that `jax.jit` could trace.
        params: the base parameters, a pytree of arrays or of `jax.ShapeDtypeStruct`; nothing is computed.
        args, kwargs: as for `fun`, arrays or `jax.ShapeDtypeStruct`.

    Returns:
        the sites, a mapping from path to `Site`.
    """
    program = stage(fun, params, args, kwargs)
    found = _uses(program, [], trace_only=True)
    sites = {}
    for path, leaf in zip(program.paths, program.params, strict=True):
        uses = tuple(use for use in found if use.path == path)
        sites[path] = Site(path, tuple(leaf.shape), leaf.dtype, _sharding(leaf), uses)
    return Sites(sites, flops(program.jaxpr))


def _sharding(leaf: Any) -> Any:
    return None if _compat.is_tracer(leaf) else sharding(leaf)


def explain(fun: Callable[..., Any], params: Any, adapter: Adapters, *args: Any, **kwargs: Any) -> Explanation:
    """Says for every use of an adapted weight whether it stays factored, and what that costs.

    Arguments:
        fun: the base program, as for `jlora.adapt`.
        params: the base parameters; `jax.ShapeDtypeStruct` leaves will do.
        adapter: the adapter, or several; `jax.ShapeDtypeStruct` leaves will do.
        args, kwargs: as for `fun`.
    """
    program = stage(fun, params, args, kwargs)
    adapters = as_adapters(adapter)
    check_fits(adapters, dict(zip(program.paths, program.params, strict=True)))
    return Explanation(tuple(_uses(program, adapters)), flops(program.jaxpr))


def _uses(program: Program, adapters: list[Adapter], *, trace_only: bool = False) -> list[Use]:
    """Every use of the adapted weights, or of all where one is trace_only."""
    paths = set(program.paths) if trace_only else {path for adapter in adapters for path in adapter}
    ctx = Context(_interpret.run, lambda f, eqn: None, trace_only=trace_only)

    def abstract(params: list[Any], args: list[Any], adapters: list[Adapter]) -> None:
        weights = [
            lower_updates(adapters, leaf, path) if path in paths or is_quantized(leaf) else leaf
            for path, leaf in zip(program.paths, params, strict=True)
        ]
        out = _interpret.run(ctx, program.jaxpr, program.consts, [*weights, *args])
        for v in out:
            if isinstance(v, AdaptedWeight):
                ctx.materialize(None, v)

    jax.eval_shape(abstract, program.params, program.args, adapters)
    return list(ctx.uses.values())
