"""The transform, and new adapters."""

import functools
import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from jlora import _compat
from jlora._interpreter import interpreter as _interpret
from jlora._interpreter.context import Context
from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora._trace.sites import Sites
from jlora._trace.stage import stage
from jlora._tree.leaves import as_array, is_quantized
from jlora._tree.paths import closest_matches, named_leaves
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._lowering import INITIAL_SUFFIX, Adapters, as_adapters, check_fits, lower_updates

_T = TypeVar("_T")


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


Targets = Mapping[str, Method | None] | Method


def init(key: jax.Array, sites: Sites, targets: Targets, *, params: Any = None, dtype: Any = jnp.float32) -> Adapter:
    """Makes a new adapter, under `jax.jit` and `jax.eval_shape` too.

    Arguments:
        key: a PRNG key. Each update's own is folded from its path, so that adding a target changes no other.
        sites: from `jlora.trace`.
        targets: patterns (`re.fullmatch` on the path; the first that matches decides) with their methods, None to
            exclude; or one method for every weight that a product or a convolution consumes. A weight that the
            program first makes another of (normalised, masked, clipped) is none of those; `print(sites)` shows all.
        params: the base parameters, for the methods and starts that look at them (PiSSA, LoRA-XS, ...).
        dtype: of the factors.

    Returns:
        the adapter, a dict from path to `Update`.

    Raises:
        ValueError: where a pattern matches nothing, never decides, or matches what its method cannot adapt; where a
            method needs `params` and there are none, or they do not fit the sites.
    """
    leaves = dict(named_leaves(params))
    return {
        path: _update(key, sites[path], method, dtype, leaves.get(path))
        for path, method in choose(sites, targets).items()
    }


def _update(key: jax.Array, site: Site, method: Method, dtype: Any, base: jax.Array | None) -> Update:
    refusal = method.unsupported_reason(site)
    if refusal:
        other = " Or give it jlora.Full(), which adapts any shape." if site.is_trainable else ""
        raise ValueError(
            f"{type(method).__name__} cannot adapt {site.path} {site.shape}: {refusal}. "
            f"Narrow the pattern, or exclude the path with an earlier pattern and None.{other}"
        )
    if method.offset and method.is_multiplicative:
        name = type(method).__name__
        raise ValueError(f"{name} scales the weight and starts from the base anyhow: leave out offset at {site.path}.")
    if method.init_needs_weight and base is None:
        raise ValueError(f"{method} starts from the weight {site.path}: pass jlora.init(..., params=params).")
    if base is not None and base.shape != site.shape:
        raise ValueError(f"{site.path} has shape {base.shape} in params, and {site.shape} in the traced program.")
    base = as_array(base) if method.init_needs_weight else None
    arrays = method.init(jax.random.fold_in(key, path_number(site.path)), site, dtype, base)
    settled = method.without_init_fields()
    factors = {name: array for name, array in arrays.items() if name not in settled.frozen}
    frozen = {name: arrays[name] for name in settled.frozen}
    if settled.offset:
        frozen |= {name + INITIAL_SUFFIX: jnp.copy(array) for name, array in factors.items()}
    return Update(factors, settled, site.roles, site.shape, frozen)


def path_number(path: str) -> int:
    """A number that a path always has, for folding into keys."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "little")


def choose(sites: Sites, targets: Targets) -> dict[str, Method]:
    """The method of every path that targets choose."""
    if not isinstance(sites, Sites):
        raise TypeError(f"The sites are what jlora.trace gives, not {type(sites).__name__}.")
    for target in targets.values() if isinstance(targets, Mapping) else [targets]:
        if targets is None or not isinstance(target, Method | None):
            what = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
            raise TypeError(f"Targets are a method such as jlora.LoRA(rank=8), or patterns with such, not {what}.")
    if isinstance(targets, Method):
        chosen = {path: targets for path, site in sites.items() if site.is_product}
        if not chosen:
            raise ValueError("No product or convolution of the program uses a parameter. print(sites) shows all.")
        return chosen
    return choose_paths(sites, targets)


def choose_paths(sites: Sites, targets: Mapping[str, _T | None]) -> dict[str, _T]:
    """What the first pattern that matches says of every path; None excludes."""
    first: dict[str, str] = {}
    for pattern in targets:
        try:
            matched = [path for path in sites if re.fullmatch(pattern, path)]
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error}); '.*' stands for anything.") from error
        if not matched:
            raise ValueError(
                f"The pattern {pattern!r} matches no parameter; {closest_matches(pattern, sites)}. Patterns are "
                "regular expressions for the whole path; print(sites) shows all."
            )
        if all(path in first for path in matched):
            raise ValueError(
                f"The pattern {pattern!r} never decides: {matched[0]} and all else that it matches is "
                f"taken by an earlier one, {first[matched[0]]!r}. Put the narrower pattern first."
            )
        for path in matched:
            first.setdefault(path, pattern)
    chosen = {path: targets[first[path]] for path in sites if path in first}
    return {path: found for path, found in chosen.items() if found is not None}
