"""The transform: a program of base parameters becomes one of base parameters and an adapter."""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax

from jlora import _compat
from jlora._interpreter import interpreter as _interpret
from jlora._interpreter.context import Context
from jlora._ir.weight import AdaptedWeight
from jlora._trace.stage import stage
from jlora._tree.leaves import is_quantized
from jlora.methods._lowering import Adapters, as_adapters, check_fits, lower_updates


class DenseWarning(UserWarning):
    """A weight with a low-rank update was formed: right, but as dear as training it whole."""


class DenseError(RuntimeError):
    """A weight would be formed where `adapt(..., on_dense="error")` forbids it."""


def adapt(fun: Callable[..., Any], *, on_dense: Literal["warn", "error", "allow"] = "warn") -> Callable[..., Any]:
    """Makes a program of base parameters one of base parameters and an adapter, without merging the two.

        adapt(f)(params, adapter, *args)  ==  f(merge(params, adapter), *args)

    Several adapters, `[first, second]`, apply in order: what they add adds up, and a later one that rotates, scales
    or normalises (DoRA, IA3, OFT, ...) does so to the weight that the earlier ones made.

    An adapted function is not adapted again: of `adapt(adapt(f))` the inner adapter gets no gradient. Use a list.

    The base parameters are constants to differentiation: gradients reach the adapter and the other arguments. What
    else is trained (a head, a norm) is an argument of its own, or has the method `Full` in the adapter.

    What lies between the factors of an update (`x @ A`) has the name "jlora" for `jax.checkpoint`: the policy
    `jax.checkpoint_policies.save_only_these_names("jlora")` keeps that, r numbers a row, and computes the rest again.

    Arguments:
        fun: `fun(params, *args, **kwargs)`, any function that `jax.jit` could trace. Python numbers, booleans and
            other arguments that are no arrays reach it as they are.
        on_dense: what to do where a weight must be formed because no rule covers its use: `"warn"` (the default),
            `"error"`, or `"allow"`. `jlora.explain` lists such uses.

    Returns:
        `g(params, adapter, *args, **kwargs)`, to be compiled (`jax.jit(g)`): outside of `jit` it runs equation by
        equation, and what `fun` itself has under `jit` is compiled again in every call. Pass the base parameters to
        `jax.jit` as an argument: closed over they become a constant, which XLA folds for minutes and holds twice.

    Raises:
        TypeError: where the adapter is none.
        ValueError: where the adapter does not fit the parameters, with every misfit; where `on_dense` is unknown.
        DenseError: with `on_dense="error"`.

    Hu et al. 2021, arXiv:2106.09685.
    """
    if on_dense not in ("warn", "error", "allow"):
        raise ValueError(f"on_dense is 'warn', 'error' or 'allow', not {on_dense!r}.")

    def adapted(params: Any, adapter: Adapters, *args: Any, **kwargs: Any) -> Any:
        adapters = as_adapters(adapter)
        params = jax.tree.map(lambda a: jax.lax.stop_gradient(a) if isinstance(a, jax.Array) else a, params)
        program = stage(fun, params, args, kwargs)
        leaves = dict(zip(program.paths, program.params, strict=True))
        check_fits(adapters, leaves)
        touched = {path for one in adapters for path in one}
        formed: dict[str, None] = {}
        ctx = Context(_interpret.run, functools.partial(_on_dense, formed, on_dense))
        touched |= {path for path, leaf in leaves.items() if is_quantized(leaf)}
        weights = [lower_updates(adapters, leaf, path) if path in touched else leaf for path, leaf in leaves.items()]
        out = _interpret.run(ctx, program.jaxpr, program.consts, [*weights, *program.args])
        out = [ctx.materialize(None, v) if isinstance(v, AdaptedWeight) else v for v in out]
        if formed:
            warnings.warn(
                "jlora formed weights, at the cost of a dense update. jlora.explain shows all of it; "
                "on_dense='allow' silences this:\n  " + "\n  ".join(formed),
                DenseWarning,
                stacklevel=2,
            )
        return program.rebuild(out)

    adapted = functools.wraps(fun)(adapted)
    adapted.__signature__ = _signature(fun)  # pyright: ignore[reportAttributeAccessIssue]
    return adapted


def _signature(fun: Callable[..., Any]) -> inspect.Signature:
    """That of `fun` with the adapter after the parameters: what reads it (`jax.jit`, Equinox) numbers arguments so."""
    kind = inspect.Parameter
    try:
        given = inspect.signature(fun)
    except (TypeError, ValueError):
        given = inspect.Signature([kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)])
    rest = list(given.parameters.values())
    first = rest.pop(0) if rest and rest[0].kind in (kind.POSITIONAL_ONLY, kind.POSITIONAL_OR_KEYWORD) else None
    new = [kind("params", kind.POSITIONAL_OR_KEYWORD), kind("adapter", kind.POSITIONAL_OR_KEYWORD)]
    taken = {"params", "adapter"} & {parameter.name for parameter in rest}
    if taken or any(parameter.kind == kind.POSITIONAL_ONLY for parameter in rest):
        new = [
            parameter.replace(name="_" * bool(taken) + parameter.name, kind=kind.POSITIONAL_ONLY) for parameter in new
        ]
    annotation = kind.empty if first is None else first.annotation
    return given.replace(parameters=[new[0].replace(annotation=annotation), new[1], *rest])


def _on_dense(formed: dict[str, None], action: str, f: AdaptedWeight, eqn: Any) -> None:
    use = f"{eqn.primitive.name} at {_compat.source_line(eqn)}" if eqn else "the program's output"
    what = f"{', '.join(f.paths)}: {use}"
    if eqn and any(n.key is not None for n in f.networks):
        raise ValueError(
            f"Dropout acts on a branch's input, and there is none where the weight is formed: {what}. "
            "Exclude the path, or set its dropout to 0."
        )
    if f.is_dense:  # an update of the weight's own shape has no other form
        return
    if action == "error":
        raise DenseError(f"The weight would be formed: {what}.")
    if action == "warn":
        formed[what] = None
