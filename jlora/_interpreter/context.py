"""What a rule may ask for while a program runs: record a use, warn of a dense weight, run a sub-program."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from jlora import _compat
from jlora._ir.materialize import dense
from jlora._ir.weight import AdaptedWeight, TensorNetwork

# A window is what a convolution slides along: contracted as "in" is, and most methods do not tell the two apart.
Role = Literal["in", "window", "out", "stack"]
Value = Any  # an array, or a Factored where a weight was


def matrix_side(role: Role) -> Role:
    """The role, a window taken for what it is a part of."""
    return "in" if role == "window" else role


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that consumes a weight.

    Arguments:
        path: the parameter.
        primitive: what consumes it.
        where: the user's source line.
        roles: for every axis of the parameter that this use says something of, its role.
        factored: whether the weight stays factored here; else it is formed.
        flops: of the base program's equation, all loop iterations counted.
        added: FLOPs that the factors add (factored), or that forming the weight adds.
        bytes: of the weight that is formed here; zero where it stays factored.
    """

    path: str
    primitive: str
    where: str
    roles: tuple[tuple[int, Role], ...]
    factored: bool
    flops: float
    added: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class Context:
    """The state of one run of the interpreter; children share all but `stack` and `trip_count`.

    Arguments:
        run: evaluates a jaxpr: `run(ctx, jaxpr, consts, values) -> values`.
        uses: every use, by the equations that lead to it, so that a body which is traced twice counts once.
        on_dense: called with a weight and the equation that has no rule for it, None for an output of the program.
        stack: the equations around this one.
        trip_count: how often this equation runs, as far as loops say.
        dropout_uses: how many uses of dropout each parameter has had, so that no two share a mask.
        trace_only: whether nothing is computed and all that matters is what the program does with its weights.
    """

    run: "Callable[[Context, Any, Sequence[Any], Sequence[Value]], list[Value]]"
    on_dense: Callable[[AdaptedWeight, Any], None]
    uses: dict[tuple[Any, ...], Use] = dataclasses.field(default_factory=dict)
    stack: tuple[int, ...] = ()
    trip_count: float = 1
    dropout_uses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    trace_only: bool = False

    def child(self, eqn: Any, trip_count: float = 1, branch: int = 0) -> "Context":
        """The context of a program inside `eqn` that runs `trip_count` times for each run of `eqn`."""
        return dataclasses.replace(self, stack=(*self.stack, id(eqn), branch), trip_count=self.trip_count * trip_count)

    def record(
        self,
        eqn: Any,
        f: AdaptedWeight,
        roles: Mapping[str, Role],
        *,
        factored: bool = True,
        flops: float = 0,
        added: float = 0,
        primitive: str = "",
    ) -> None:
        """Notes what `eqn` does with the letters of a weight; `primitive` names the lookup that it completes.

        Without an equation the program itself hands the weight out.
        """
        for path in f.paths:
            axes: dict[int, Role] = {}
            known = [x for x in f.indices if x.name in roles]
            for letter in sorted(known, key=lambda x: ("stack", "out", "window", "in").index(roles[x.name])):
                # An axis that was split may play several roles: the factors are shared along what is not contracted.
                axes |= {axis: roles[letter.name] for p, axis in letter.origins if p == path}
            if primitive:
                axes |= {axis: "in" for p, axis in f.gathered_axes if p == path}
            self.uses[*self.stack, id(eqn), path] = Use(
                path=path,
                primitive=primitive or (eqn.primitive.name if eqn else "output"),
                where=_compat.source_line(eqn) if eqn else "",
                roles=tuple(sorted(axes.items())),
                factored=factored,
                flops=flops * self.trip_count,
                added=added * self.trip_count,
                bytes=0 if factored else f.base.size * f.dtype.itemsize,
            )

    def materialize(self, eqn: Any, f: AdaptedWeight) -> jax.Array:
        """The weight itself, where `eqn` has no rule that keeps it factored, or where (None) it is an output.

        Rows that were looked up are no weight any more but an activation, which has to be there.
        """
        if f.gathered_axes:
            roles: dict[str, Role] = {x.name: "out" for x in f.indices if x.origins}
            self.record(eqn, f, roles, primitive="gather", added=f.base.size)
        else:
            self.record(eqn, f, {}, factored=False, added=f.base.size)
            self.on_dense(f, eqn)
        return dense(f)

    def with_dropout_keys(self, f: AdaptedWeight) -> AdaptedWeight:
        """The weight with dropout keys of their own for this use."""
        if not any(n.key is not None for n in f.networks):
            return f
        number = self.dropout_uses[f.paths[0]]
        self.dropout_uses[f.paths[0]] += 1
        return fold_dropout_keys(f, number)


def fold_dropout_keys(f: AdaptedWeight, number: int | jax.Array) -> AdaptedWeight:
    """The weight with a number folded into its dropout keys."""

    def network(n: TensorNetwork) -> TensorNetwork:
        if n.key is None:
            return n
        folded = jax.numpy.vectorize(lambda k: jax.random.fold_in(k, number))(n.key)
        return dataclasses.replace(n, key=folded)

    return dataclasses.replace(f, networks=tuple(map(network, f.networks)))
