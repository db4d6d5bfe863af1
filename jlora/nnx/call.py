"""A call of an adapted module: a program of its arrays, evaluated with adapted weights, and its changes of state."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from flax import nnx

from jlora._adapter.adapt import evaluate
from jlora._trace.changes import inputs_returned
from jlora._trace.stage import Program, stage
from jlora._tree.leaves import is_quantized
from jlora.nnx.factors import Factors, OnDense, is_variable
from jlora.nnx.graph import adapted_variables, detach, restore

_TAG = "jlora"


@dataclasses.dataclass(frozen=True)
class Structure:
    """Modules without their arrays; it holds no tracer, so it may outlive a trace.

    Arguments:
        graphdef: the modules.
        paths: the keys of each array; the first is the number of its module.
        makers: what makes a Variable of each array, or returns it if a module holds it without one.
    """

    graphdef: Any
    paths: tuple[tuple[Any, ...], ...]
    makers: list[Callable[[Any], Any]]

    def modules(self, values: Sequence[Any], *, is_inner: bool) -> tuple[Any, ...]:
        """The modules with other values: new ones inside of a call, and updated ones after it."""
        filled = [make(value) for make, value in zip(self.makers, values, strict=True)]
        with nnx.merge_context(_TAG, inner=is_inner) as ctx:
            return ctx.unflatten(self.graphdef, nnx.FlatState.from_sorted_keys_values(self.paths, filled))


def _split(modules: tuple[Any, ...]) -> tuple[Structure, list[Any]]:
    """Modules as their structure and their Variables and arrays; the context relates what a call returns to them."""
    with nnx.split_context(_TAG) as ctx:
        graphdef, state = ctx.flatten(modules)
    leaves = [leaf for _, leaf in state]
    return Structure(graphdef, tuple(path for path, _ in state), [_maker(leaf) for leaf in leaves]), leaves


def _maker(leaf: Any) -> Callable[[Any], Any]:
    if not is_variable(leaf):
        return lambda value: value
    kind, metadata = type(leaf), leaf.get_metadata()
    return lambda value: kind.from_metadata(jax.tree.map(lambda x: x, value), metadata)  # a call may fill a dict


@dataclasses.dataclass
class Call:
    """A method of a module with its arguments, as a program of arrays.

    Arguments:
        function: `function(module, *args, **kwargs)`.
        module: the module; the function gets it as a plain one.
        args, kwargs: the arguments, which may hold modules and Variables too.
        returns_weights: whether `run` returns the weights as they are after the call.

    Attributes:
        structure: of the module, and of the modules among the arguments.
        leaves: their Variables and arrays.
        names: the path in the module of each array; empty for those of the arguments.
    """

    function: Callable[..., Any]
    module: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    returns_weights: bool = False

    def __post_init__(self) -> None:
        self._arguments, self._arguments_def = jax.tree.flatten((self.args, self.kwargs), is_leaf=_is_node)
        self.structure, self.leaves = _split((self.module, *filter(_is_node, self._arguments)))
        self.names = ["" if path[0] else "/".join(map(str, path[1:])) for path in self.structure.paths]

    def values(self) -> dict[str, Any]:
        """The values of the module's Variables and arrays by path."""
        pairs = zip(self.names, self.leaves, strict=True)
        return {name: value_of(leaf) for name, leaf in pairs if name}

    def factors(self) -> dict[str, Factors]:
        """The factors of each adapted weight by its path."""
        paths = {id(leaf): name for name, leaf in zip(self.names, self.leaves, strict=True)}
        return {paths[id(variable)]: factors for variable, factors in adapted_variables(self.module)}

    def arguments(self, weights: Collection[str]) -> tuple[dict[str, Any], list[Any], list[Any]]:
        """The arguments of `run`: the weights of these paths, all other arrays of modules, and the other arguments."""
        values = [value_of(leaf) for leaf in self.leaves]
        self._weights = {k: name for k, name in enumerate(self.names) if name in weights}
        params = {name: values[k] for k, name in self._weights.items()}
        rest = [None if k in self._weights else value for k, value in enumerate(values)]
        return params, rest, [None if _is_node(leaf) else leaf for leaf in self._arguments]

    def run(self, params: dict[str, Any], rest: list[Any], others: list[Any]) -> dict[str, Any]:
        """The call as a pure function of its arrays: its result, what it changed, and the weights after it."""
        values = [params[self._weights[k]] if k in self._weights else value for k, value in enumerate(rest)]
        modules = self.structure.modules(values, is_inner=True)
        inner = [leaf for _, leaf in nnx.flatten(modules, graph=True)[1]]
        nodes = iter(modules[1:])
        filled = [next(nodes) if _is_node(old) else new for old, new in zip(self._arguments, others, strict=True)]
        args, kwargs = jax.tree.unflatten(self._arguments_def, filled)
        removed = detach(modules[0])
        try:
            result = self.function(modules[0], *args, **kwargs)
        finally:
            restore(removed)
        out, self._out_def = jax.tree.flatten(result, is_leaf=_is_node)
        self._out_nodes = [_is_node(leaf) for leaf in out]
        after, leaves = _split((*modules, *filter(_is_node, out)))
        self._after = None if self._has_same_structure(after, leaves, values) else after
        outer = {id(inner[k]): self.leaves[k] for k in self._weights}
        self._kept = {k: outer[id(leaf)] for k, leaf in enumerate(leaves) if id(leaf) in outer}
        new = {k: value_of(leaf) for k, leaf in enumerate(leaves) if k not in self._kept}
        if self._after is None:
            new = {k: value for k, value in new.items() if not _is_same(value, values[k])}
        weights = {name: value_of(inner[k]) for k, name in self._weights.items()} if self.returns_weights else {}
        return {"out": [None if _is_node(leaf) else leaf for leaf in out], "state": new, "weights": weights}

    def _has_same_structure(self, after: Structure, leaves: list[Any], values: list[Any]) -> bool:
        if after.paths != self.structure.paths or after.graphdef.with_no_outer_index() != self.structure.graphdef:
            return False
        return all(is_variable(leaf) or _is_same(leaf, value) for leaf, value in zip(leaves, values, strict=True))

    def finish(self, result: dict[str, Any]) -> Any:
        """Updates the state of the modules, and returns what the function returned.

        Arguments:
            result: what `run` returned, with values.
        """
        nodes: Any = iter(())
        if self._after is None:
            for k, value in result["state"].items():
                self.leaves[k].set_raw_value(value)
        else:
            indices = range(len(self._after.paths))
            values = [result["state"][k] if k in result["state"] else value_of(self._kept[k]) for k in indices]
            modules = self._after.modules(values, is_inner=False)
            nodes = iter(modules[len(modules) - sum(self._out_nodes) :])
        pairs = zip(self._out_nodes, result["out"], strict=True)
        return jax.tree.unflatten(self._out_def, [next(nodes) if is_node else value for is_node, value in pairs])


def in_context() -> Any:
    """The context in which a `Call` is made, run and finished."""
    return nnx.update_context(_TAG)


def call(module: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`function(module, *args, **kwargs)` with the weights of an adapted module adapted.

    Arguments:
        module: an adapted module, or a part of one.
        function: of the plain module.
        args, kwargs: its other arguments.

    Raises:
        ValueError: if the call changes a weight that has an update.
    """
    with in_context():
        staged = Call(function, module, args, kwargs, returns_weights=True)
        adapted, values = staged.factors(), staged.values()
        adapter = {path: factors.next(path, values[path]) for path, factors in adapted.items()}
        quantized = {path for path, value in values.items() if is_quantized(value)}
        params, *others = staged.arguments({*adapter, *quantized})
        program = stage(staged.run, params, tuple(others), {})
        if changed := _changed_weights(program):
            raise ValueError(
                f"The call changes {changed[0]}, which has an update: its new value would hold the update too. Exclude "
                "the path, or keep what a call changes in a Variable of another type than nnx.Param."
            )
        on_dense = _strictest({factors.on_dense for factors in adapted.values()})
        num_outputs = program.num_outputs - len(program.paths)
        weights = zip(program.paths, program.params, strict=True)
        frozen = [jax.tree.map(functools.partial(_frozen, path), weight) for path, weight in weights]
        outputs = evaluate(dataclasses.replace(program, params=frozen), [adapter], on_dense, num_outputs)
        return staged.finish(program.rebuild([*outputs, *program.params]))


def _strictest(stated: set[OnDense]) -> OnDense:
    return "error" if "error" in stated else "allow" if stated == {"allow"} else "warn"


def _changed_weights(program: Program) -> list[str]:
    """The paths of the weights that a call changes; its last outputs are the weights after it."""
    after = inputs_returned(program.jaxpr)[-len(program.paths) :]
    return [path for path, var, out in zip(program.paths, program.jaxpr.invars, after, strict=False) if var is not out]


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def value_of(leaf: Any) -> Any:
    """The value of a Variable, or an array that a module holds without one."""
    return leaf.get_raw_value() if is_variable(leaf) else leaf


def _is_same(new: Any, old: Any) -> bool:
    """Whether two trees hold the same objects."""
    (new_leaves, new_structure), (old_leaves, old_structure) = jax.tree.flatten(new), jax.tree.flatten(old)
    return new_structure == old_structure and all(a is b for a, b in zip(new_leaves, old_leaves, strict=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _frozen(path: str, array: jax.Array) -> jax.Array:
    """The array, which nothing may be differentiated with respect to."""
    return array


@_frozen.defjvp
def _raise(path: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"A gradient is taken with respect to {path}, the base of an update, which is not trained. Select the factors: "
        "nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)) and nnx.Optimizer(model, tx, "
        "wrt=nnx.LoRAParam)."
    )
