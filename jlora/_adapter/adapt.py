"""The transform: a function of base parameters becomes a function of base parameters and an adapter."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax

from jlora._interpreter import interpreter as _interpret
from jlora._interpreter.context import Context
from jlora._ir.weight import AdaptedWeight
from jlora._trace.stage import Program, check_function, stage
from jlora._trace.trace import lower_parameters
from jlora._tree.paths import is_array, named_leaves
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_adapters, check_fits


class DenseWarning(UserWarning):
    """A weight with a low-rank update was materialised: correct, but as expensive as training the full weight."""


class DenseError(RuntimeError):
    """A weight would be materialised, which `adapt(..., on_dense="error")` forbids."""


def adapt(fun: Callable[..., Any], *, on_dense: Literal["warn", "error", "allow"] = "warn") -> Callable[..., Any]:
    """Turns a function of base parameters into one of base parameters and an adapter, without merging the two.

        adapt(f)(params, adapter, *args)  ==  f(merge(params, adapter), *args)

    Several adapters, `[first, second]`, apply in order: their additive updates are summed, and a later one that
    rotates, scales or normalises (DoRA, IA3, OFT, ...) acts on the weight that the earlier ones result in.

    Do not nest `adapt`: `adapt(adapt(f))` raises when it is called. Pass a list.

    The base parameters are constants for differentiation: gradients reach the adapter and the other arguments. To
    train other parameters too (a head, a norm), pass them as an argument, or give them the method `Full`.

    The intermediates of rank r (`x @ A`) have the name "jlora" for `jax.checkpoint`: the policy
    `jax.checkpoint_policies.save_only_these_names("jlora")` saves them, r numbers a row, and recomputes the rest.

    Arguments:
        fun: `fun(params, *args, **kwargs)`, any function that `jax.jit` could trace. Python numbers, booleans and
            other arguments that are not arrays reach it unchanged.
        on_dense: what to do if a weight must be materialised because no rule covers its use: `"warn"` (the default),
            `"error"`, or `"allow"`. `jlora.explain` lists such uses.

    Returns:
        `g(params, adapter, *args, **kwargs)`. Compile it (`jax.jit(g)`): outside of `jit` every call traces `fun` and
            runs it equation by equation; parts of `fun` under `jit` are compiled once, loops outside of `jit` in every
            call. Pass the base parameters to `jax.jit` as an argument: if they are closed over, they become a constant,
            which XLA folds for minutes and stores twice.

    Raises:
        TypeError: if `fun` is not a function; from `g`, if `fun` is adapted already, or if `adapter` is not an adapter
            or a list of adapters.
        ValueError: if `on_dense` is not one of the three; from `g`, if the adapter does not fit the parameters, with
            every misfit.
        DenseError: from `g`, if a weight must be materialised and `on_dense` is "error".

    Example:
        loss = lambda adapter, params, x, y: jnp.mean((jlora.adapt(apply)(params, adapter, x) - y) ** 2)
        gradients = jax.jit(jax.grad(loss))(adapter, params, x, y)

    Hu et al. 2021, arXiv:2106.09685.
    """
    if on_dense not in _ON_DENSE:
        raise ValueError(f"on_dense must be 'warn', 'error' or 'allow', not {on_dense!r}.")
    check_function(fun)

    def adapted(*args: Any, **kwargs: Any) -> Any:
        if getattr(fun, "is_adapted_by_jlora", False):
            raise TypeError(
                "This function was adapted twice, and the adapter applied first would get a gradient of zero. Adapt "
                "the base function once, and pass a list of adapters: adapt(f)(params, [first, second], ...)."
            )
        (params, adapter), args = _take_first(("params", "adapter"), args, kwargs)
        adapters = as_adapters(adapter)
        check_fits(adapters, {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)})
        params = jax.tree.map(lambda a: jax.lax.stop_gradient(a) if isinstance(a, jax.Array) else a, params)
        program = stage(fun, params, args, kwargs)
        return program.rebuild(evaluate(program, adapters, on_dense, program.num_outputs))

    adapted = functools.wraps(fun)(adapted)
    adapted.__signature__ = _signature(fun)  # pyright: ignore[reportAttributeAccessIssue]
    adapted.is_adapted_by_jlora = True  # pyright: ignore[reportAttributeAccessIssue]
    return adapted


def evaluate(
    program: Program, adapters: list[Adapter], on_dense: Literal["warn", "error", "allow"], num_outputs: int
) -> list[Any]:
    """The outputs of a program whose parameters are adapted.

    Arguments:
        program: the base program, with its parameters.
        adapters: the adapters, in order.
        on_dense: as for `adapt`.
        num_outputs: how many of the program's outputs are computed; the others are left out.

    Raises:
        DenseError: if a weight must be materialised and `on_dense` is "error".
    """
    ctx = Context(_interpret.run, _ON_DENSE[on_dense], keeps_compiled=True)
    weights = lower_parameters(program, program.params, adapters)
    out = _interpret.run(ctx, program.jaxpr, program.consts, [*weights, *program.args])
    out = [ctx.materialize(None, v) if isinstance(v, AdaptedWeight) else v for v in out[:num_outputs]]
    if ctx.warnings:
        warnings.warn(
            "jlora materialised weights, at the cost of a dense update. jlora.explain shows every use; "
            "on_dense='allow' silences this warning:\n  " + "\n  ".join(ctx.warnings),
            DenseWarning,
            stacklevel=3,
        )
    return out


def _take_first(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], tuple[Any, ...]]:
    """The first arguments, by position or, if there are fewer, by name; all others belong to the program."""
    first = [*args[: len(names)], *(kwargs.pop(name) for name in names[len(args) :] if name in kwargs)]
    if len(first) < len(names):
        raise TypeError(
            f"An adapted function is called as g({', '.join(names)}, *args), and got {len(first)} of these "
            f"{len(names)} arguments. The adapter follows the parameters; a module of Flax NNX is adapted by "
            "jlora.nnx.adapt."
        )
    return first, args[len(names) :]


def _signature(fun: Callable[..., Any]) -> inspect.Signature:
    """The signature of `fun` with the adapter after the parameters: `jax.jit` and Equinox number arguments by it."""
    kind = inspect.Parameter
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        signature = inspect.Signature([kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)])
    rest = list(signature.parameters.values())
    first = rest.pop(0) if rest and rest[0].kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) else None
    new = [kind("params", kind.POSITIONAL_OR_KEYWORD), kind("adapter", kind.POSITIONAL_OR_KEYWORD)]
    taken = {"params", "adapter"} & {parameter.name for parameter in rest}
    if taken or any(parameter.kind == kind.POSITIONAL_ONLY for parameter in rest):
        new = [
            parameter.replace(name="_" * bool(taken) + parameter.name, kind=kind.POSITIONAL_ONLY) for parameter in new
        ]
    annotation = kind.empty if first is None else first.annotation
    return signature.replace(parameters=[new[0].replace(annotation=annotation), new[1], *rest])


def _on_dense(action: str, w: AdaptedWeight, primitive: str, where: str) -> str | None:
    """What the user is warned of if a weight is materialised; None for nothing. Raises if that is forbidden."""
    consumer = f"{primitive} at {where}" if primitive else "the program's output"
    use = f"{', '.join(w.paths)}: {consumer}"
    if primitive and any(network.key is not None for network in w.networks):
        raise ValueError(
            "Dropout acts on the input of the low-rank branch, and PVeRA draws on its activations, but this use "
            f"materialises the weight: {use}. Exclude the path, or set its dropout to 0."
        )
    if w.is_dense:  # an update that is as large as the weight has no factors to keep
        return None
    if action == "error":
        raise DenseError(
            f"The weight would be materialised: {use}. No rule keeps its update factored. Exclude the path, or pass "
            "on_dense='warn'."
        )
    return use if action == "warn" else None


# One object for each action: what was compiled for one adapted function serves another one with the same action.
_ON_DENSE = {action: functools.partial(_on_dense, action) for action in ("warn", "error", "allow")}
