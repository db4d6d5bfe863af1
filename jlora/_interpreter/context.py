"""What a rule may ask for while a program runs: record a use, materialise a weight, run an inner program."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from jlora import _compat
from jlora._compat import Body, Eqn, Jaxpr
from jlora._interpreter.device_axes import Axes, OperandAxes, operand_axes
from jlora._interpreter.flops import equation_flops
from jlora._ir.materialize import dense
from jlora._ir.probe import probes, refuse
from jlora._ir.structured import with_matrices
from jlora._ir.weight import AdaptedWeight, TensorNetwork
from jlora._ops.inputs import record_lookup

# A "window" is a spatial axis of a convolution: it is contracted as "in" is, and most methods do not distinguish them.
Role = Literal["in", "window", "out", "stack"]
Value = Any  # an array, or an `AdaptedWeight` in the place of a weight

_PRODUCTS = ("dot_general", "ragged_dot_general", "conv_general_dilated")
_LOOKUPS = ("gather", "dynamic_slice")
_RECORD_ORDER: tuple[Role, ...] = ("stack", "out", "window", "in")


def matrix_side(role: Role) -> Role:
    """The role of an axis in the weight as a matrix: a window belongs to "in"."""
    return "in" if role == "window" else role


@dataclasses.dataclass(frozen=True)
class Use:
    """One equation that consumes a weight.

    Arguments:
        path: the parameter.
        primitive: the name of the primitive that consumes it.
        where: the line of the user's program.
        roles: the axes of the parameter whose role this use specifies, with that role.
        factored: whether the weight stays factored here. If not, it is materialised.
        dense_in: the primitive that takes the dense weight, if it is not factored: a function with a derivative of its
            own (`custom_vjp_call`) takes it for all uses inside. Empty if it is factored.
        form: how the update is computed, "factored" or "dense sum" for example.
        why: what decided on the form; empty if there was no choice.
        flops: of the base program's equation, over all iterations of its loops. With symbolic sizes (`jax.export`) this
            and the next two are expressions of them.
        added: FLOPs that the factors add, or that materialising the weight adds.
        bytes: of the weight that is materialised here; zero if it stays factored.
    """

    path: str
    primitive: str
    where: str
    roles: tuple[tuple[int, Role], ...]
    factored: bool
    flops: float
    added: float
    bytes: int
    dense_in: str = ""
    form: str = ""
    why: str = ""

    @property
    def is_lookup(self) -> bool:
        """Whether this use reads rows of the weight, as an embedding does."""
        return self.primitive in _LOOKUPS

    @property
    def is_product(self) -> bool:
        """Whether this use is a product or a convolution."""
        return self.primitive in _PRODUCTS


@dataclasses.dataclass(frozen=True)
class Context:
    """The state of one run of the interpreter. Contexts of inner programs differ in their position alone.

    Arguments:
        run: evaluates a jaxpr: `run(ctx, jaxpr, consts, values) -> values`.
        on_dense: called with a weight that is materialised, and with the primitive and the line that do so. It returns
            what the user is warned of, or None.
        warnings: what `on_dense` returned.
        uses: None if uses are not collected, else every use, by the position of its equation, its path, and whether the
            weight stays factored, so that a body which is traced twice counts once.
        stack: the position of the current equation: its number in the program, preceded by the numbers of the
            equations around it, each with the number of its branch.
        eqns: the current equation, preceded by those around it.
        caller: the line of the equation around a program that is compiled on its own, which `eqns` lacks.
        trip_count: how often the current equation runs, as far as the lengths of loops are known.
        device_axes: inside a `shard_map`, the mesh axes along which each operand of an equation varies, by the position
            of the equation; filled if there is dropout.
        dropout_uses: how many uses with dropout each parameter has had, so that no two share a mask.
        trace_only: whether nothing is computed, and the run only collects uses.
        keeps_compiled: whether the bodies of `jit` are compiled once for all runs with the same `on_dense`. They do not
            record uses then.
        dense_in: while tracing, the primitive around the current program that takes dense weights.
    """

    run: "Callable[[Context, Jaxpr, Sequence[Any], Sequence[Value]], list[Value]]"
    on_dense: Callable[[AdaptedWeight, str, str], str | None]
    warnings: dict[str, None] = dataclasses.field(default_factory=dict)
    uses: dict[tuple[int | str, ...], Use] | None = None
    stack: tuple[int, ...] = ()
    eqns: tuple[Eqn, ...] = ()
    caller: str = ""
    trip_count: float = 1
    device_axes: OperandAxes = dataclasses.field(default_factory=dict)
    dropout_uses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    trace_only: bool = False
    keeps_compiled: bool = False
    dense_in: str = ""

    def at(self, number: int, eqn: Eqn) -> "Context":
        """The context of an equation, which has this number in the current program."""
        return dataclasses.replace(self, stack=(*self.stack, number), eqns=(*self.eqns, eqn))

    def child(self, trip_count: float = 1, branch: int = 0) -> "Context":
        """The context of a program inside the current equation.

        Arguments:
            trip_count: how often the program runs in each run of the equation.
            branch: its number among the equation's programs.
        """
        return dataclasses.replace(self, stack=(*self.stack, branch), trip_count=self.trip_count * trip_count)

    def record(
        self,
        eqn: Eqn | None,
        f: AdaptedWeight,
        roles: Mapping[str, Role],
        *,
        factored: bool = True,
        added: float = 0,
        primitive: str = "",
        form: str = "",
        why: str = "",
    ) -> None:
        """Records a use of a weight.

        Arguments:
            eqn: the equation, or None if the weight is an output of the program.
            f: the weight.
            roles: the role of each index of the weight that the equation specifies.
            factored: whether the weight stays factored.
            added: FLOPs that the update adds, in one run.
            primitive: the name of the lookup that the equation completes, if it is not the equation's own.
            form: how the update is computed; by default "factored" or "dense".
            why: what decided on the form.
        """
        if self.uses is None:
            return
        factored = factored and not self.dense_in
        name = eqn.primitive.name if eqn else "output"
        where = self.where if eqn else ""
        # The product of rows that were looked up is not one of the table; a weight that is materialised has no role.
        flops = equation_flops(eqn) if eqn and roles and not primitive else 0
        for path in f.paths:
            axes = _axis_roles(f, path, roles)
            if primitive:
                axes |= {axis: "in" for origin, axis in f.gathered_axes if origin == path}
            self.uses[*self.stack, path, factored] = Use(
                path=path,
                primitive=primitive or name,
                where=where,
                roles=tuple(sorted(axes.items())),
                factored=factored,
                flops=flops * self.trip_count,
                added=added * self.trip_count,
                bytes=0 if factored else f.base.size * f.dtype.itemsize,
                dense_in="" if factored else self.dense_in or name,
                form=(form or ("factored" if factored else "dense")) if not self.dense_in else "dense",
                why=why if not self.dense_in else f"inside {self.dense_in}",
            )

    @property
    def where(self) -> str:
        """The line of the user's program that the current equation comes from.

        The equations inside functions of `jax.numpy` and of other libraries have no such line: it is that of the call.
        """
        own = (_compat.source_line(eqn) for eqn in self.eqns[::-1])
        of_libraries = (_compat.source_line(eqn, of_library=True) for eqn in self.eqns[::-1])
        return next(filter(None, itertools.chain(own, [self.caller], of_libraries)), "")

    def forget_inner_uses(self) -> None:
        """Drops the uses inside the current equation, whose body will be traced again with other values.

        `trace` keeps them: they specify roles.
        """
        if self.trace_only or self.uses is None:
            return
        depth = len(self.stack)
        for key in [key for key in self.uses if key[:depth] == self.stack and isinstance(key[depth], int)]:
            del self.uses[key]

    def materialize(self, eqn: Eqn | None, f: AdaptedWeight) -> jax.Array:
        """The dense weight, for an equation that has no rule for it; `eqn` is None for an output of the program.

        The result of a lookup is an activation: materialising it is not a dense fallback. Nor is it one for the right
        weight of a product of two.
        """
        f = with_matrices(f)
        f = f if f.multiplied is None else dataclasses.replace(f, paths=f.multiplied)
        if f.gathered_axes:
            roles: dict[str, Role] = {x.name: "out" for x in f.indices if x.origins}
            self.record(eqn, f, roles, primitive="gather", added=f.base.size)
        else:
            self.record(eqn, f, {}, factored=False, added=f.base.size, why="no rule for this use")
            warning = self.on_dense(f, eqn.primitive.name if eqn else "", self.where) if f.paths else None
            if warning is not None:
                self.warnings[warning] = None
        value = dense(f)
        return value + record_lookup(f).astype(value.dtype) if probes([f]) else value

    def refuse_parts(self, f: AdaptedWeight, contracted: str) -> None:
        """Raises if a weight has a probe, and a product with these contracted indices does not show its inputs.

        Raises:
            ValueError: with the path and the line.
        """
        for probe in probes([f]):
            if reason := probe.refusal(contracted):
                refuse(probe.path, f"{reason}, at {self.where}")

    def to_array(self, eqn: Eqn | None, value: Value) -> jax.Array:
        """The value as an array: a weight is materialised, an array is returned as it is."""
        return self.materialize(eqn, value) if isinstance(value, AdaptedWeight) else value

    def child_on_devices(self, body: Body, axes: Sequence[Axes], values: Sequence[Value]) -> "Context":
        """The context of a program inside the current equation, which is a `shard_map` or may be inside of one.

        Arguments:
            body: the program.
            axes: the mesh axes along which each of its inputs varies.
            values: its inputs. Nothing is computed unless one has dropout.
        """
        inner = self.child()
        if not any(map(has_dropout, values)):
            return inner
        return dataclasses.replace(inner, device_axes=operand_axes(body, axes, inner.stack))

    def with_dropout_keys(self, f: AdaptedWeight, operand: int) -> AdaptedWeight:
        """The weight with the dropout keys of this use, which no other use and no other device has.

        Devices that have the same activation keep one mask.

        Arguments:
            f: the weight.
            operand: the position of the activation among the equation's operands.
        """
        if not has_dropout(f):
            return f
        if axes := self.device_axes[self.stack][operand] if self.stack in self.device_axes else ():
            f = fold_dropout_keys(f, jax.lax.axis_index(tuple(sorted(axes, key=str))))
        number = self.dropout_uses[f.paths[0]]
        self.dropout_uses[f.paths[0]] += 1
        return fold_dropout_keys(f, number)


def _axis_roles(f: AdaptedWeight, path: str, roles: Mapping[str, Role]) -> dict[int, Role]:
    """The roles of a parameter's axes, by the roles of the indices that come from them."""
    axes: dict[int, Role] = {}
    indices = [x for x in f.indices if x.name in roles]
    for index in sorted(indices, key=lambda x: _RECORD_ORDER.index(roles[x.name])):
        # The parts of a split axis may have several roles: the last one, "in", decides.
        axes |= {axis: roles[index.name] for origin, axis in index.origins if origin == path}
    return axes


def has_dropout(value: Value) -> bool:
    """Whether a value is a weight with dropout keys."""
    return isinstance(value, AdaptedWeight) and any(n.key is not None for n in value.networks)


def fold_dropout_keys(f: AdaptedWeight, number: int | jax.Array) -> AdaptedWeight:
    """The weight with a number folded into its dropout keys."""

    def network(n: TensorNetwork) -> TensorNetwork:
        if n.key is None:
            return n
        folded = jax.numpy.vectorize(lambda k: jax.random.fold_in(k, number))(n.key)
        return dataclasses.replace(n, key=folded)

    return dataclasses.replace(f, networks=tuple(map(network, f.networks)))
