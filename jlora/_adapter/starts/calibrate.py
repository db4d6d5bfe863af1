"""Records the inputs of weights while a program runs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._adapter.adapt import DenseError, adapt
from jlora._adapter.starts.inputs import Inputs
from jlora._interpreter.site import Site
from jlora._ir.probe import Probe
from jlora._ir.weight import AdaptedWeight
from jlora._trace.trace import trace
from jlora._tree.paths import is_array
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.networks import add_network
from jlora.methods._lowering import as_single


def calibrate(fun: Callable[..., Any], adapter: Adapter) -> Callable[..., dict[str, Inputs]]:
    """Makes a function that runs a program and records the inputs of the weights that an adapter updates.

        record(params, *args)[path]  ==  Inputs(sum of x x^T, sum of x, number of x)

    A row x is what the in axes of the weight meet: the activation of a product, the window of a convolution, the unit
    vector of an id that an embedding looks up. Each layer of a stack and each expert has sums of its own. A weight that
    the program uses several times has the inputs of all uses with these in axes.

    The sums are the gradient of a probe, computed in float32. So they count the inputs that training sees: those of
    uses on which the floating-point outputs of `fun` depend through derivatives. For a weight with n inputs, n^2
    numbers are kept for each layer, and for an embedding one for each row.

    Arguments:
        fun: the base program, as for `jlora.adapt`.
        adapter: from `jlora.init`. Its paths and the roles of their axes count, not its values.

    Returns:
        `record(params, *args, **kwargs)`, which returns an `Inputs` for every path. Compile it (`jax.jit(record)`) and
            add what it returns for several batches: `jax.tree.map(jnp.add, first, second)`.

    Raises:
        TypeError: if `adapter` is not an adapter, or from `record`, if `fun` is adapted already.
        ValueError: from `record`, if the adapter does not fit, or if the inputs of a weight cannot be recorded: the
            weight is materialised, multiplied with another one, or cut along its in axes in a `shard_map`; with its
            path.

    Example:
        record = jax.jit(jlora.calibrate(model.apply, adapter))
        inputs = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (record(params, x) for x in batches))
        adapter = jlora.eva(adapter, inputs)
    """
    updates = as_single(adapter)
    adapted = adapt(fun, on_dense="error")

    def record(params: Any, *args: Any, **kwargs: Any) -> dict[str, Inputs]:
        sites = trace(fun, params, *args, **kwargs)
        probes = {path: _probe(update, sites.get(path)) for path, update in updates.items()}

        def outputs(probes: Adapter) -> list[jax.Array]:
            leaves = jax.tree.leaves(adapted(params, probes, *args, **kwargs))
            return [y for y in leaves if is_array(y) and jnp.issubdtype(y.dtype, jnp.inexact)]

        try:
            values, pull_back = jax.vjp(outputs, probes)
        except DenseError as error:
            raise ValueError(
                f"The inputs of a weight cannot be recorded. {str(error).split('. ')[0]}. Leave it out of the adapter "
                "that jlora.calibrate gets."
            ) from error
        if not values:
            raise ValueError(
                "The function returns no floating-point array, and inputs are recorded by derivatives of its outputs. "
                "Pass the function that returns logits or a loss."
            )
        (sums,) = pull_back([jnp.zeros_like(y) for y in values])
        return {path: _inputs(update) for path, update in sums.items()}

    return record


@final
@dataclasses.dataclass(frozen=True)
class _Recorder(Method):
    """Adds a probe to the weight."""

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        return {"probe": "*stack *in width", "rows": "*stack"}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        terms = [(update[name], declared) for name, declared in update.declared.items()]
        *networks, last = add_network(w, update, terms, 1.0).networks
        fields = {field.name: getattr(last, field.name) for field in dataclasses.fields(last)}
        return dataclasses.replace(w, networks=(*networks, Probe(**fields, path=w.paths[0])))


def _probe(update: Update, site: Site | None) -> Update:
    """An update with a probe in the place of its method: `[I, 0]`, or ones for an embedding."""
    axes = update.axes
    stack, n_in = axes.sizes("*stack"), axes.count("*in")
    is_lookup = site is not None and site.is_lookup
    matrix = jnp.ones((n_in, 1)) if is_lookup else jnp.eye(n_in, n_in + 1)
    probe = jnp.broadcast_to(matrix, (*stack, *matrix.shape))
    method = _Recorder(layers=update.layers)
    return Update({"probe": probe, "rows": jnp.ones(stack)}, method, update.roles, update.shape)


def _inputs(sums: Update) -> Inputs:
    probe, rows = sums.factors["probe"], sums.factors["rows"]
    second = probe[..., :-1] if probe.shape[-1] > 1 else None
    return Inputs(second, probe[..., -1], rows)
