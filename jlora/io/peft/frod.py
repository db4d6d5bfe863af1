"""FRoD in PEFT's files: the basis V and the places of the entries, which modules of one category share.

    W' = U (S + diag(l)) V^T    with torch's weights, (out, in)

The file has l and the entries of every module, and V and the places once for each category; PEFT computes U from V and
the base.
"""

import collections
import dataclasses
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.method_fields import is_flipped
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.tensors import Tensors
from jlora.methods import FRoD
from jlora.methods._base import Update
from jlora.methods._common.digits import from_digits, to_digits

OTHER_BASIS = (
    "FRoD: PEFT computes V from the base again when it loads the file, and U from that V. Its update is the same on a "
    "machine whose linear algebra gives the V of the file, such as the one that has trained the adapter."
)
_ROOT = "base_model."
_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")


def category(name: str) -> str:
    """The category of a module by its name: the last two parts, or the last one if a number is before it."""
    *before, last = name.split(".")
    if not before or before[-1].isdigit():
        return last
    if before[-2:] == ["attention", "output"] and last == "dense":
        return "attention_output"
    return f"{before[-1]}_{last}"


def read_frod(config: Config, tensors: Tensors) -> Tensors:
    """The tensors with V and the places at every module, the places as digits.

    Raises:
        ValueError: if the file lacks those of a category.
    """
    modules = [name.removesuffix(".frod_lambda_l") for name in tensors if name.endswith(".frod_lambda_l")]
    shared = {
        name: tensors.pop(name) for name in list(tensors) if name.startswith(tuple(f"{_ROOT}{s}." for s in _SHARED))
    }
    for module in modules:
        names = [f"{_ROOT}{array}.{category(module.removeprefix(PREFIX))}" for array in _SHARED[:2]]
        if missing := [name for name in names if name not in shared]:
            raise ValueError(
                f"The file lacks {missing}, which PEFT computes from the base and draws: save it with "
                "save_projection=True."
            )
        v, (row, column) = shared[names[0]], shared[names[1]].astype(np.int64)
        tensors |= {f"{module}.frod_V": v, f"{module}.frod_s_indices": to_digits(row * len(v) + column, 4)}
    return tensors


def with_modules(method: FRoD, name: str, tensors: Mapping[str, np.ndarray]) -> FRoD:
    """The method with the number of modules that share V with a module.

    Arguments:
        method: the method.
        name: of the module.
        tensors: all of the file, after `read_frod`.
    """
    modules = [key.removeprefix(PREFIX).removesuffix(".frod_V") for key in tensors if key.endswith(".frod_V")]
    return dataclasses.replace(method, peft_modules=sum(category(other) == category(name) for other in modules))


def apart(update: Update) -> Update:
    """The same update with V and the places for every layer of a stack, as PEFT's modules have them."""
    assert isinstance(update.method, FRoD)
    method = dataclasses.replace(update.method, shared="none")
    shapes, frozen = method.shapes(update.axes), dict(update.frozen)
    stack = len(update.axes.sizes("*stack"))
    for name in ("v", "place"):
        layer = np.asarray(frozen[name])
        is_shared = layer.size != np.prod(shapes[name])
        frozen[name] = np.broadcast_to(layer.reshape(shapes[name][stack * is_shared :]), shapes[name])
    return dataclasses.replace(update, method=method, frozen=frozen)


def together(update: Update) -> Update:
    """The inverse of `apart` for an update that was read, if all layers have the same V and places."""
    method, stack = update.method, len(update.axes.sizes("*stack"))
    if not isinstance(method, FRoD) or update.layers is not None:
        return update
    arrays = {name: np.asarray(update.factors[name]) for name in ("v", "place")}
    first = {name: array[(0,) * stack] for name, array in arrays.items()}
    if any((arrays[name] != first[name]).any() for name in first):
        return update
    shared = dataclasses.replace(method, shared="layers")
    return dataclasses.replace(update, method=shared, factors={**update.factors, **first})


def basis_products(weight: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """U and l0 as PEFT computes them, in float64: also rows that are nothing but rounding errors have length 1.

    Arguments:
        weight: the base, (in, out).
        v: V.
    """
    wide = v.astype(np.float64)
    try:
        product = np.linalg.solve(wide, weight.astype(np.float64))
    except np.linalg.LinAlgError:
        product = np.linalg.pinv(wide, rcond=1e-6) @ weight.astype(np.float64)
    length = np.linalg.norm(product, axis=1)
    is_row = length > 1e-12
    u = np.where(is_row[:, None], product / np.where(is_row, length, 1)[:, None], 0)
    return {"u": u.astype(np.float32), "l0": length.astype(np.float32)}


def add_frod(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Moves V and the places from the modules to their categories, and gives the configuration.

    Raises:
        ValueError: if those of a category differ, or if modules are missing that PEFT's V depends on.
    """
    sizes = collections.Counter(category(name) for name in entries)
    for name, (location, factors) in entries.items():
        kind = category(name)
        v, digits = (tensors.pop(f"{PREFIX}{name}.{array}") for array in _SHARED[:2])
        place = np.asarray(from_digits(digits)).astype(np.int64)
        arrays = (v, np.stack([place // len(v), place % len(v)]), np.array([len(v)] * 2, np.int64))
        new = {f"{_ROOT}{array}.{kind}": value for array, value in zip(_SHARED, arrays, strict=True)}
        assert isinstance(factors.method, FRoD)
        is_another = any(key in tensors and not np.array_equal(tensors[key], value) for key, value in new.items())
        if is_another or factors.method.peft_modules != sizes[kind]:
            raise ValueError(
                f"{location.path} ({name}) is one of {factors.method.peft_modules} modules of the category {kind} that "
                f"share V in the file that it was read from, and the adapter has {sizes[kind]}"
                f"{', with another V' if is_another else ''}: PEFT would compute another V from these. Save all "
                "weights of that file together, or merge the adapter."
            )
        tensors |= new
    return {
        "bias": "none",
        "fan_in_fan_out": is_flipped(entries),
        "frod_dropout": shared_field(entries, "dropout"),
        "init_weights": True,
        "modules_to_save": None,
        "projection_prng_key": 0,
        "regularization_alpha": shared_field(entries, "ridge"),
        "save_projection": True,
        "sparse_rate": shared_field(entries, "density"),
    }
