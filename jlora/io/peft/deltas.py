"""What PEFT keeps whole and jlora as a difference from the base: magnitudes, trained weights, scaled biases."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jlora._interpreter.context import Role, matrix_side
from jlora._tree.leaves import as_array
from jlora._tree.paths import is_array, named_leaves
from jlora.io.torch.module_names import Place, bias_of, owners_of
from jlora.methods._base import Adapter, Update
from jlora.methods.dora import DoRA
from jlora.methods.full import Full
from jlora.methods.ia3 import IA3


class Base:
    """The base parameters by path, wide enough for differences; `why` says what they are needed for."""

    def __init__(self, params: Any) -> None:
        self.leaves = None if params is None else {path: a for path, a in named_leaves(params) if is_array(a)}

    def __contains__(self, path: str) -> bool:
        return self.leaves is not None and path in self.leaves

    def leaf(self, path: str, shape: tuple[int, ...], why: str) -> Any:
        """The weight at a path.

        Raises:
            ValueError: without base parameters, or where the weight is missing or of another shape.
        """
        if self.leaves is None:
            raise ValueError(f"{path}: {why}. Pass params=, the base parameters.")
        if path not in self.leaves or tuple(self.leaves[path].shape) != shape:
            found = tuple(self.leaves[path].shape) if path in self.leaves else "no such parameter"
            raise ValueError(f"{path} has shape {shape} in the adapter; in params: {found}.")
        return self.leaves[path]

    def value(self, path: str, shape: tuple[int, ...], why: str) -> np.ndarray:
        array = np.asarray(as_array(self.leaf(path, shape, why)))
        return array.astype(np.promote_types(np.float32, array.dtype) if array.dtype == np.float64 else np.float32)


def norms(weight: np.ndarray, roles: tuple[Role, ...]) -> np.ndarray:
    """The norms of a weight over its in axes, its stack axes first."""
    order = [k for role in ("stack", "out") for k, r in enumerate(roles) if r == role]
    inner = tuple(k for k, r in enumerate(roles) if matrix_side(r) == "in")
    square = np.square(weight.transpose([*order, *inner]).astype(np.float64))
    return np.sqrt(square.sum(tuple(range(len(order), weight.ndim)))).astype(weight.dtype)


def difference(value: np.ndarray, base: np.ndarray) -> np.ndarray:
    """What added to the base gives the value again, to the last bit where the dtype has such a number."""
    value = value.astype(base.dtype)
    d = value - base
    return d + (value - (base + d))


_WHOLE = "PEFT stores it whole, and jlora what it differs from the base by"


def whole(path: str, update: Update, base: Base) -> Update:
    """An update with the values that PEFT stores in place of differences."""
    if isinstance(update.method, DoRA):
        weight = base.value(path, update.shape, f"DoRA's magnitude: {_WHOLE}")
        m = np.asarray(update.factors["m"], np.float32) * np.float32(update.scale)
        m = (norms(weight, update.roles) + m).astype(np.asarray(update.factors["b"]).dtype)
        return dataclasses.replace(update, factors={**update.factors, "m": m})
    if isinstance(update.method, Full):
        leaf = base.leaf(path, update.shape, f"a trained weight: {_WHOLE}")
        d = np.asarray(update.factors["d"], np.float32) * np.float32(update.scale)
        value = (base.value(path, update.shape, "") + d).astype(leaf.dtype)
        return dataclasses.replace(update, factors={"d": value}, scale=1.0)
    if isinstance(update.method, IA3) and update.scale != 1:
        gains = 1 + np.float32(update.scale) * (np.asarray(update.factors["l"], np.float32) - 1)
        return dataclasses.replace(update, factors={"l": gains}, scale=1.0)
    return update


def relative(path: str, update: Update, base: Base) -> Update:
    """The inverse of `whole`."""
    if isinstance(update.method, DoRA):
        norm = norms(base.value(path, update.shape, f"DoRA's magnitude: {_WHOLE}"), update.roles)
        return dataclasses.replace(update, factors={**update.factors, "m": difference(update.factors["m"], norm)})
    if isinstance(update.method, Full):
        weight = base.value(path, update.shape, f"a trained weight: {_WHOLE}")
        return dataclasses.replace(update, factors={"d": difference(update.factors["d"], weight)})
    return update


_BIAS = "PEFT's IA3 scales a layer's bias with its weight"


def unnamed_bias(path: str, update: Update, leaves: Mapping[str, Any], known: Collection[str]) -> str | None:
    """A parameter beside a weight that has its stack and out axes and no other, and that the names do not know."""
    parent = path.rpartition("/")[0]
    sizes = sorted(n for n, r in zip(update.shape, update.roles, strict=True) if matrix_side(r) != "in")
    beside = (other for other in leaves if other.rpartition("/")[0] == parent and other not in (path, *known))
    return next((other for other in beside if sorted(leaves[other].shape) == sizes), None)


def scaled_bias(path: str, update: Update, bias: str, base: Base) -> Update:
    """What PEFT's IA3 does to a layer's bias, as an update of its own."""
    order = [r for role in ("stack", "out") for r in update.roles if r == role]
    gains = np.asarray(whole(path, update, base).factors["l"], np.float32)
    shape = gains.shape
    if len(order) != gains.ndim:
        raise ValueError(f"{path} and its bias {bias} have different axes.")
    value = base.value(bias, shape, _BIAS)
    return Update({"d": (gains - 1) * value}, Full(), (), shape)


def biases(adapter: Adapter, leaves: Mapping[str, Any], found: Mapping[str, Place]) -> dict[str, str]:
    """The biases that PEFT's IA3 scales in an adapter: from the path of the weight to that of its bias.

    Raises:
        ValueError: where a weight seems to have a bias that the names do not know.
    """
    owners = owners_of(found)
    out = {}
    for path, update in adapter.items():
        if not (isinstance(update.method, IA3) and update.method.axis == "out"):
            continue
        bias = bias_of(found[path], owners)
        unnamed = unnamed_bias(path, update, leaves, found)
        if bias is None and unnamed is not None:
            raise ValueError(f"{_BIAS}, and {unnamed} may be that of {path}: give it a name, as a parameter.")
        if bias in leaves:
            out[path] = bias
    return out


def without_scaled_biases(adapter: Adapter, base: Base, found: Mapping[str, Place]) -> Adapter:
    """An adapter without the updates of biases that PEFT's IA3 does by itself.

    Raises:
        ValueError: where a bias beside an IA3 is not scaled with it.
    """
    out = dict(adapter)
    for path, update in adapter.items():
        if isinstance(update.method, IA3) and update.method.axis == "out":
            base.leaf(path, update.shape, f"{_BIAS}, so whether there is one matters")
    for path, bias in biases(adapter, base.leaves or {}, found).items():
        want = scaled_bias(path, adapter[path], bias, base).factors["d"]
        have = adapter.get(bias)
        got = np.zeros_like(want) if have is None else np.asarray(have.factors["d"]) * np.float32(have.scale)
        if not np.allclose(got, want, rtol=1e-5, atol=1e-6 * np.abs(want).max(initial=0)):
            raise ValueError(
                f"{_BIAS}, and jlora's scales {path} alone: {bias} would change. Give it jlora.Full() with "
                "d = (l - 1) * bias, or adapt another weight."
            )
        out.pop(bias, None)
    return out
