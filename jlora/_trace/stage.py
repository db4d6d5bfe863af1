"""A function with its arguments as a jaxpr whose first inputs are the parameters' arrays."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora import _compat
from jlora._compat import Jaxpr
from jlora._trace.changes import Modules, inputs_returned, lost
from jlora._tree.leaves import is_quantized, sharding
from jlora._tree.paths import flatten, is_array, named_leaves

_VALUE_NEEDED = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A call as a jaxpr and its inputs.

    Arguments:
        jaxpr: the program, an open jaxpr.
        consts: values of its constants.
        paths: the paths of the parameters' arrays, in the order of the jaxpr's first inputs.
        params: those arrays, or quantised weights.
        args: the arrays among the other arguments, in the order of the remaining inputs.
        num_outputs: how many of the jaxpr's outputs are the function's.
        rebuild: makes the function's result from the values of those outputs.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    paths: list[str]
    params: list[Any]
    args: list[Any]
    num_outputs: int
    rebuild: Callable[[Sequence[Any]], Any]


def check_function(fun: Any) -> None:
    """Raises if what should be adapted or traced is not a function.

    Raises:
        TypeError: with what to pass.
    """
    if not callable(fun):
        raise TypeError(
            f"Expected a function f(params, *args) as the first argument, found {type(fun).__name__}: the apply of a "
            "Linen module or of hk.transform, lambda model, x: model(x) for Equinox."
        )


def stage(fun: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
    """Traces `fun(params, *args, **kwargs)`.

    Arrays (and `jax.ShapeDtypeStruct`) become inputs of the program. The function sees everything else in the arguments
    as it is, Python numbers and booleans included. Outputs that are not arrays are returned as they are.

    Raises:
        ValueError: if the call changes an nnx module among its arguments, and does not return the change.
    """
    check_function(fun)
    weights, params_def = flatten(params)
    others, others_def = jax.tree.flatten((args, kwargs))
    leaves = [*weights, *others]
    names = [path for path, _ in named_leaves(params)]
    dynamic = [k for k, leaf in enumerate(leaves) if is_array(leaf)]
    result: dict[str, Any] = {}

    def flat(values: list[Any]) -> list[Any]:
        filled = list(leaves)
        for k, value in zip(dynamic, values, strict=True):
            filled[k] = value
        new_params = jax.tree.unflatten(params_def, filled[: len(weights)])
        new_args, new_kwargs = jax.tree.unflatten(others_def, filled[len(weights) :])
        modules = Modules((new_params, new_args, new_kwargs))
        out, result["treedef"] = jax.tree.flatten(fun(new_params, *new_args, **new_kwargs))
        result["leaves"] = [None if is_array(leaf) else leaf for leaf in out]
        result["arrays"] = [k for k, leaf in enumerate(out) if is_array(leaf)]
        positions = {id(value): k for k, value in enumerate(values)}
        changes = modules.changes(out)
        result["changed"] = [(path, positions[id(old)]) for path, old, _ in changes]
        return [out[k] for k in result["arrays"]] + [new for _, _, new in changes]

    values = [leaves[k] for k in dynamic]
    try:
        jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(flat)([_abstract(value) for value in values]))
    except _VALUE_NEEDED as error:
        error.add_note(
            _about_values(str(error), [*[f"params {path}" for path in names], *_names(args, kwargs)], dynamic)
        )
        raise
    num_outputs, changed = len(result["arrays"]), result["changed"]
    sources = inputs_returned(jaxpr)[num_outputs:] if changed else []
    if changed := [p for (p, k), source in zip(changed, sources, strict=True) if source is not jaxpr.invars[k]]:
        raise lost(changed)
    num_params = sum(k < len(names) for k in dynamic)

    def rebuild(outputs: Sequence[Any]) -> Any:
        filled = list(result["leaves"])
        for k, value in zip(result["arrays"], outputs, strict=True):
            filled[k] = value
        return jax.tree.unflatten(result["treedef"], filled)

    paths = [names[k] for k in dynamic[:num_params]]
    return Program(jaxpr, consts, paths, values[:num_params], values[num_params:], num_outputs, rebuild)


def _names(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What to call the leaves of the arguments after the parameters."""
    trees = (("args", args), ("kwargs", kwargs))
    return [
        name + jax.tree_util.keystr(keys)
        for name, tree in trees
        for keys, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _about_values(message: str, names: list[str], dynamic: list[int]) -> str:
    """What an error about a value that is not known while the function is traced is about, and what to do."""
    numbers = dict.fromkeys(int(k) for k in re.findall(r"values\[(\d+)\]", message))
    meant = "".join(f"values[{k}] is {names[dynamic[k]]}. " for k in numbers if k < len(dynamic))
    return (
        f"jlora traces the function as jax.jit does, so its arrays have no values. {meant}Pass what decides the "
        "control flow as a Python value; under jax.jit that is a static argument (static_argnames=...)."
    )


def _abstract(value: Any) -> Any:
    """The value that the program is traced with: a quantised weight becomes the array that it stands for."""
    if not is_quantized(value):
        return value
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(value))
