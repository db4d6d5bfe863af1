"""The calls of `jlora.nnx`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jlora import _compat
from jlora._adapter.init import init
from jlora._adapter.merge import merge as merge_params
from jlora._adapter.sharding import shardings
from jlora._adapter.targets import Targets, check_targets
from jlora._trace.explain import Explanation
from jlora._trace.explain import explain as explain_function
from jlora._trace.sites import Roles, Sites
from jlora._trace.trace import trace as trace_function
from jlora._tree.paths import is_array
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single, check_fits
from jlora.methods._sharing import tie, untie
from jlora.nnx.call import Call, in_context, value_of
from jlora.nnx.classes import attach
from jlora.nnx.factors import Factors, OnDense, is_variable, with_shared_variables
from jlora.nnx.graph import adapted_variables, bound_attributes, detach, is_adapted, nodes_of

M = TypeVar("M", bound=nnx.Module)
MethodOf = str | Callable[..., Any]


def trace(
    model: nnx.Module, /, *args: Any, method: MethodOf = "__call__", roles: Roles | None = None, **kwargs: Any
) -> Sites:
    """Lists every Param of a module: its shape, the roles of its axes, and the equations that consume it.

    Nothing is computed and the module does not change, so its arrays may be abstract (`nnx.eval_shape`).

    Arguments:
        model: the module, adapted or not.
        args, kwargs: the arguments of the method.
        method: the name of the method, or a function `method(model, *args, **kwargs)` that calls several.
        roles: as for `jlora.trace`.

    Returns:
        the sites, for `jlora.init` and `jlora.peft`. The paths are those of `nnx.state(model)`, joined by slashes.

    Example:
        print(jlora.nnx.trace(model, x))
    """
    with in_context():
        call = Call(_function(method), model, args, kwargs)
        params, rest, others = call.arguments(_params(call))
        return trace_function(call.run, params, rest, others, roles=roles)


def explain(model: nnx.Module, /, *args: Any, method: MethodOf = "__call__", **kwargs: Any) -> Explanation:
    """Lists every use of an adapted weight of a module, as `jlora.explain` does for a function.

    Arguments:
        model: an adapted module.
        args, kwargs: the arguments of the method.
        method: as for `trace`.

    Returns:
        the uses. `print` shows them as a table.
    """
    with in_context():
        call = Call(_function(method), model, args, kwargs)
        params, rest, others = call.arguments(_params(call))
        return explain_function(call.run, params, adapter(model), rest, others)


def adapt(
    model: M,
    targets: Targets | Adapter,
    /,
    *args: Any,
    rngs: nnx.Rngs | None = None,
    method: MethodOf = "__call__",
    roles: Roles | None = None,
    dtype: DTypeLike = jnp.float32,
    on_dense: OnDense = "warn",
    **kwargs: Any,
) -> M:
    """Makes an adapted module of a module: it is used, trained and saved as any other module.

        adapt(model, targets, x, rngs=rngs)(x)  ==  merge(adapt(model, targets, x, rngs=rngs))(x)

    The result is a copy of the module that shares its arrays; the given module does not change. Its class is a subclass
    of the module's, and so are those of its submodules that hold adapted weights: every method of each applies the
    updates. The factors are `nnx.LoRAParam`, beside their weight: `model.layers[0].query.kernel_lora` for the Param
    `model.layers[0].query.kernel`. Attributes and properties show the base.

    A weight that has an update is a constant: a gradient with respect to it raises. Other Params are not, so a filter
    can select them too: `nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))`.

    Arguments:
        model: the module, an `nnx.Module`.
        targets: as for `jlora.init`: patterns, a function or a method; or an adapter, which then needs no arguments.
        args, kwargs: the arguments of a call, which shows how the weights are used. Nothing is computed.
        rngs: the stream `params` has the key for the factors, the stream `dropout` those for methods with dropout.
        method: as for `trace`.
        roles: as for `jlora.trace`.
        dtype: of the factors.
        on_dense: as for `jlora.adapt`.

    Returns:
        the adapted module. `train()` and `eval()` switch dropout of the low-rank branch too.

    Raises:
        TypeError: if `targets` are neither targets nor an adapter, if `rngs` is missing, or if `model` is not a module.
        ValueError: as `jlora.init`; if the targets are empty; if the module is adapted already; if the adapter does not
            fit it; if an attribute holds a bound method that uses an adapted weight, or no module holds such a weight
            itself.

    Example:
        model = jlora.nnx.adapt(model, {r".*(query|value)/kernel": jlora.LoRA(8)}, x, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, x, y):
            def loss(model):
                return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

            value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
            optimizer.update(model, grads)
            return value
    """
    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            f"jlora.nnx.adapt takes an nnx.Module, not {type(model).__name__}. For a function of a tree of parameters, "
            "such as the apply of a Linen module, call jlora.adapt."
        )
    if isinstance(targets, Mapping) and not targets:
        raise ValueError("The targets are empty, so nothing would train: pass patterns of paths with their methods.")
    if any(is_adapted(node) for node in nodes_of(model)):
        raise ValueError("The module is adapted already. Merge it first, or adapt jlora.nnx.base(model).")
    new = nnx.clone(model, graph=True)
    variables, params = _variables(new), _param_values(new)
    updates = _given_adapter(targets)
    if updates is None:
        check_targets(cast(Targets, targets))
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(
                f"New factors need random numbers, and rngs is {rngs!r}: pass rngs=nnx.Rngs(0), or an adapter in place "
                "of targets."
            )
        sites = trace(new, *args, method=method, roles=roles, **kwargs)
        updates = init(rngs["params"](), sites, cast(Targets, targets), params=params, dtype=dtype)
    check_fits([updates], {path: value_of(variable) for path, variable in variables.items()})
    weights = {id(variable) for path, variable in _variables(model).items() if path in updates}
    if bound := bound_attributes(model, weights):
        raise ValueError(
            f"{', '.join(bound)}: a method bound to the given module, so a copy would call it without the update. "
            "Define a method in its place, or exclude the weights."
        )
    if not any(map(_compat.is_tracer, jax.tree.leaves((updates, params)))):
        updates = jax.device_put(updates, shardings(updates, params))
    updates = untie(updates)
    factors = {p: Factors(update, variables[p], on_dense, rngs, p) for p, update in updates.items()}
    attach(new, {id(variables[path]): beside for path, beside in with_shared_variables(factors).items()})
    return new


def adapter(model: nnx.Module, /) -> Adapter:
    """The adapter of a module: for `jlora.save`, `jlora.peft.save`, `jlora.summary` and `jlora.bank`.

    Arguments:
        model: an adapted module.

    Returns:
        a dict from path to `Update`, whose arrays are those of the module.

    Raises:
        ValueError: if the module is not adapted.

    Example:
        jlora.save("run/adapter", jlora.nnx.adapter(model))
    """
    return tie({path: factors.get(value_of(variable)) for path, (variable, factors) in _adapted(model).items()})


def set_adapter(model: nnx.Module, updates: Adapter, /) -> None:
    """Gives an adapted module other values, in place: those of an adapter with the same paths, methods and shapes.

    Arguments:
        model: an adapted module.
        updates: the adapter, for example from `jlora.load`.

    Raises:
        TypeError: if `updates` is not an adapter.
        ValueError: if the module is not adapted, or the adapter is not of the same form.

    Example:
        jlora.nnx.set_adapter(model, jlora.load("run/adapter"))
    """
    adapted, updates = _adapted(model), untie(as_single(updates))
    current = {path: factors.get(value_of(variable)) for path, (variable, factors) in adapted.items()}
    different = sorted(p for p in {*current, *updates} if _form(current.get(p)) != _form(updates.get(p)))
    if different:
        raise ValueError(
            f"The adapter has another form than the module's, at {', '.join(different[:5])}: it must have the same "
            "paths, methods and shapes. Make another adapted module: jlora.nnx.adapt(jlora.nnx.base(model), adapter)."
        )
    for path, (_, factors) in adapted.items():
        jax.tree.map(lambda v, array: v.set_raw_value(array), factors.update, updates[path], is_leaf=is_variable)


def base(model: M, /) -> M:
    """The plain module inside of an adapted one, without the update: a copy that shares its arrays.

    Arguments:
        model: an adapted module.

    Returns:
        a module of the original class, with the present state (statistics, keys, caches).

    Raises:
        ValueError: if the module is not adapted.
    """
    _adapted(model)
    plain = nnx.clone(model, graph=True)
    detach(plain)
    return plain


def merge(model: M, /, *, requantize: bool = False) -> M:
    """Returns the plain module with the update merged into its weights; the adapted module does not change.

    Arguments:
        model: an adapted module.
        requantize: as for `jlora.merge`.

    Returns:
        a module of the original class, with the merged weights and the present state (statistics, keys, caches). A
        weight that several modules share is merged once, and they still share it.

    Raises:
        ValueError: if the module is not adapted.

    Example:
        logits = jlora.nnx.merge(model)(x)
    """
    updates, plain = adapter(model), base(model)
    variables = _variables(plain)
    weights = {path: value_of(variables[path]) for path in updates}
    for path, value in merge_params(weights, updates, requantize=requantize).items():
        variables[path].set_raw_value(value)
    return plain


def _given_adapter(targets: Any) -> Adapter | None:
    if not isinstance(targets, Mapping) or not all(isinstance(target, Update) for target in targets.values()):
        return None
    return as_single(cast(Adapter, targets))


def _function(method: MethodOf) -> Callable[..., Any]:
    if not isinstance(method, str):
        return method
    return lambda model, /, *args, **kwargs: getattr(model, method)(*args, **kwargs)


def _params(call: Call) -> list[str]:
    """The paths of the module's parameters."""
    pairs = zip(call.names, call.leaves, strict=True)
    return [name for name, leaf in pairs if name and _is_param(leaf)]


def _is_param(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Param) and not isinstance(leaf, nnx.LoRAParam)


def _variables(model: Any) -> dict[str, nnx.Variable[Any]]:
    """The Variables of a module that hold one array or one quantised weight, by path."""
    entries = nnx.flatten(model, graph=True)[1]
    return {"/".join(map(str, path)): v for path, v in entries if is_variable(v) and is_array(value_of(v))}


def _param_values(model: Any) -> dict[str, Any]:
    return {path: value_of(variable) for path, variable in _variables(model).items() if _is_param(variable)}


def _adapted(model: nnx.Module) -> dict[str, tuple[nnx.Variable[Any], Factors]]:
    """The adapted weights of a module with their factors, by path."""
    paths = {id(variable): path for path, variable in _variables(model).items()}
    adapted = {paths[id(variable)]: (variable, factors) for variable, factors in adapted_variables(model)}
    if not adapted:
        raise ValueError(f"{type(model).__name__} is not adapted: it is not what jlora.nnx.adapt returned.")
    return adapted


def _form(update: Update | None) -> Any:
    """What two updates have in common if one can have the values of the other."""
    return jax.tree.map(lambda array: (array.shape, array.dtype), update), jax.tree.structure(update)
