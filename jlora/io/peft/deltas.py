"""Values that PEFT stores absolutely and jlora as a difference from the base: magnitudes, trained weights, biases."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._interpreter.context import Role, matrix_side
from jlora._tree.leaves import as_array
from jlora._tree.paths import is_array, named_leaves
from jlora.io.torch.module_names import Names, absent_paths, bias_hint
from jlora.io.torch.weight_location import WeightLocation, bias_of, owners_of
from jlora.methods import IA3, DoRA, Full, RoAd
from jlora.methods._base import Adapter, Update
from jlora.methods._common.layers import layer_axis


class BaseParams:
    """The base parameters by path, if the caller passed them."""

    def __init__(self, params: Any) -> None:
        self.leaves = None if params is None else {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)}

    def leaf(self, path: str, shape: tuple[int, ...], purpose: str) -> Any:
        """The parameter at a path.

        Arguments:
            path: of the parameter.
            shape: that it has in the adapter.
            purpose: what it is needed for, for the error.

        Raises:
            ValueError: without base parameters, or if the parameter is missing or of another shape.
        """
        if self.leaves is None:
            raise ValueError(f"{path}: {purpose}. Pass params=, the base parameters.")
        if path not in self.leaves or tuple(self.leaves[path].shape) != shape:
            actual = tuple(self.leaves[path].shape) if path in self.leaves else "there is no such parameter"
            raise ValueError(
                f"{path} has shape {shape} in the adapter; in params: {actual}. Pass the parameters that it adapts."
            )
        return self.leaves[path]

    def value(self, path: str, shape: tuple[int, ...], purpose: str) -> np.ndarray:
        """The value of a parameter, in float32 or wider."""
        array = np.asarray(as_array(self.leaf(path, shape, purpose)))
        return array.astype(np.float64 if array.dtype == np.float64 else np.float32)


def norms(weight: np.ndarray, roles: tuple[Role, ...]) -> np.ndarray:
    """The norms of a weight over its in axes, its stack axes first."""
    kept = [axis for role in ("stack", "out") for axis, axis_role in enumerate(roles) if axis_role == role]
    summed = tuple(axis for axis, axis_role in enumerate(roles) if matrix_side(axis_role) == "in")
    square = np.square(weight.transpose([*kept, *summed]).astype(np.float64))
    return np.sqrt(square.sum(tuple(range(len(kept), weight.ndim)))).astype(weight.dtype)


def difference(value: np.ndarray, base: np.ndarray) -> np.ndarray:
    """What added to the base gives the value again, to the last bit if the dtype has such a number."""
    value = value.astype(base.dtype)
    delta = value - base
    return delta + (value - (base + delta))


_MAGNITUDE = "PEFT stores DoRA's magnitude absolutely, and jlora as a difference from the norms of the base"
_TRAINED = "PEFT stores a trained weight absolutely, and jlora as a difference from the base"
_BIAS = "PEFT's IA3 and RoAd change a layer's bias with its weight"


def to_absolute(path: str, update: Update, base: BaseParams) -> Update:
    """An update with the values that PEFT stores in place of differences.

    Arguments:
        path: of the weight.
        update: of the weight.
        base: the base parameters.

    Raises:
        ValueError: if the base is needed and missing.
    """
    match update.method:
        case DoRA():
            weight = update.at_layers(base.value(path, update.shape, _MAGNITUDE))
            delta = np.asarray(update.factors["m"], np.float32) * np.float32(update.scale)
            magnitude = norms(weight, update.roles) + delta  # as large as norms, so not in 16 bits
            return dataclasses.replace(update, factors={**update.factors, "m": magnitude})
        case Full():
            dtype = base.leaf(path, update.shape, _TRAINED).dtype
            delta = np.asarray(update.factors["d"], np.float32) * np.float32(update.scale)
            value = (update.at_layers(base.value(path, update.shape, _TRAINED)) + delta).astype(dtype)
            return dataclasses.replace(update, factors={"d": value}, scale=1.0)
        case IA3() if update.scale != 1:
            return dataclasses.replace(update, factors={"l": ia3_vector(update)}, scale=1.0)
    return update


def to_delta(path: str, update: Update, base: BaseParams) -> Update:
    """The inverse of `to_absolute`."""
    match update.method:
        case DoRA():
            norm = norms(update.at_layers(base.value(path, update.shape, _MAGNITUDE)), update.roles)
            return dataclasses.replace(update, factors={**update.factors, "m": difference(update.factors["m"], norm)})
        case Full():
            weight = update.at_layers(base.value(path, update.shape, _TRAINED))
            return dataclasses.replace(update, factors={"d": difference(update.factors["d"], weight)})
    return update


def ia3_vector(update: Update) -> np.ndarray:
    """What IA3 multiplies the weight by, the scale of the update included."""
    vector = np.asarray(update.factors["l"])
    return vector if update.scale == 1 else 1 + np.float32(update.scale) * (vector.astype(np.float32) - 1)


def _unnamed_bias(path: str, update: Update, leaves: Mapping[str, Any], named: Collection[str]) -> str | None:
    """A parameter beside a weight that has its stack and out axes and no others, and is not in the map."""
    parent = path.rpartition("/")[0]
    siblings = (other for other in leaves if other.rpartition("/")[0] == parent and other not in (path, *named))
    sizes = sorted(n for n, role in zip(update.shape, update.roles, strict=True) if matrix_side(role) != "in")
    return next((other for other in siblings if sorted(leaves[other].shape) == sizes), None)


def scaled_bias(path: str, update: Update, bias: str, base: BaseParams) -> Update:
    """What PEFT's IA3 and RoAd add to a layer's bias: (l - 1) * bias, or (R - I) bias.

    Arguments:
        path: of the weight.
        update: of the weight, RoAd, or IA3 along its out axes.
        bias: the path of the bias.
        base: the base parameters.

    Raises:
        ValueError: if the base is missing, or the axes of the bias are not those of the weight.
    """
    if isinstance(update.method, RoAd):
        return _rotated_bias(path, update, update.method, bias, base)
    vector = ia3_vector(update).astype(np.float32)
    if update.layers is not None:
        all_layers = np.ones((update.shape[layer_axis(update)], *vector.shape[1:]), np.float32)
        all_layers[list(update.layers)] = vector
        vector = all_layers
    kept = [role for role in update.roles if role in ("stack", "out")]
    if len(kept) != vector.ndim:
        raise ValueError(f"{path} has {len(kept)} stack and out axes, and its IA3 has {vector.ndim} for {bias}.")
    value = base.value(bias, vector.shape, _BIAS)
    return Update({"d": (vector - 1) * value}, Full(), (), vector.shape)


def _rotated_bias(path: str, update: Update, method: RoAd, bias: str, base: BaseParams) -> Update:
    shape = tuple(n for n, role in zip(update.shape, update.roles, strict=True) if role in ("stack", "out"))
    if update.layers is not None:
        raise ValueError(f"{path} rotates some layers of a stack, and {bias} is that of all: merge the adapter.")
    value = base.value(bias, shape, _BIAS)
    return Update({"d": np.asarray(method.rotate(update, jnp.asarray(value))) - value}, Full(), (), shape)


def _scales_output(update: Update) -> bool:
    return isinstance(update.method, RoAd) or (isinstance(update.method, IA3) and update.method.axis == "out")


def scaled_biases(
    adapter: Adapter, leaves: Mapping[str, Any], locations: Mapping[str, WeightLocation], names: Names
) -> dict[str, str]:
    """The biases that PEFT's IA3 and RoAd change: from the path of the weight to that of its bias.

    Arguments:
        adapter: the adapter.
        leaves: the parameters, or sites, by path.
        locations: of the weights that the map knows.
        names: the map.

    Raises:
        ValueError: if a weight seems to have a bias that is not in the map; the message says what to write.
    """
    owners, biases, absent = owners_of(locations), {}, absent_paths(names, leaves)
    for path, update in adapter.items():
        if not _scales_output(update):
            continue
        bias = bias_of(locations[path], owners)
        unnamed = _unnamed_bias(path, update, leaves, {*locations, *absent})
        if bias is None and unnamed is not None:
            raise ValueError(
                f"{_BIAS}, and {unnamed} may be that of {path}: add it to names, as a 'parameter': "
                f"{bias_hint(unnamed, names)}. If torch's module has no bias, state that: "
                f"names[{unnamed!r}] = None."
            )
        if bias in leaves:
            biases[path] = bias
    return biases


def without_scaled_biases(
    adapter: Adapter, base: BaseParams, locations: Mapping[str, WeightLocation], names: Names
) -> Adapter:
    """The adapter without those updates of biases that PEFT's IA3 and RoAd imply.

    Raises:
        ValueError: if the adapter does not scale a bias beside an IA3 with the weight, or the base is missing.
    """
    for path, update in adapter.items():
        if _scales_output(update):
            base.leaf(path, update.shape, f"{_BIAS}, so the file depends on whether there is one")
    remaining = dict(adapter)
    for path, bias in scaled_biases(adapter, base.leaves or {}, locations, names).items():
        expected = scaled_bias(path, adapter[path], bias, base).factors["d"]
        actual = remaining.pop(bias, None)
        delta = 0 if actual is None else np.asarray(actual.factors["d"]) * np.float32(actual.scale)
        if not np.allclose(delta, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(initial=0)):
            raise ValueError(
                f"{_BIAS}, and jlora's update changes {path} alone: {bias} would change. Give it jlora.Full() with "
                "d = (l - 1) * bias for IA3, d = (R - I) bias for RoAd, or adapt another weight."
            )
    return remaining
