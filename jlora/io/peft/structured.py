"""PEFT's updates of full rank that a small array determines: C3A, FourierFT, WaveFT and SHiRA."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.method_fields import is_flipped
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.targets import exact_endings, exact_patterns
from jlora.io.peft.tensors import Tensors
from jlora.methods import C3A, FourierFT, FRoD, RandLoRA, SHiRA, WaveFT
from jlora.methods._base import Method, Update
from jlora.methods._common.digits import from_digits, to_digits

METHODS = (C3A, FourierFT, WaveFT, SHiRA)

_INDICES = "shira_indices"
_HAAR = ("db1", "haar")
_VALUES = {C3A: "c3a_kernel", FourierFT: "fourierft_spectrum", WaveFT: "waveft_spectrum", SHiRA: "shira_weight"}


def _read_c3a(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    return C3A(tensors["c3a_kernel"].shape[2]), tensors


def _read_fourierft(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    count = len(tensors["fourierft_spectrum"])  # of whatever pattern, as PEFT draws the first ones of a permutation
    return FourierFT(count, config["scaling"], config["random_loc_seed"], "torch"), tensors


def _read_waveft(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    if config.get("wavelet_family", "db1") not in _HAAR:
        raise ValueError(
            f"wavelet_family = {config['wavelet_family']!r}: jlora has Haar's wavelet, {' or '.join(_HAAR)}, alone. "
            "Merge the adapter with PEFT."
        )
    if not config.get("use_idwt", True):
        raise ValueError(
            "use_idwt = False: its entries are those of the weight, without a transform. Merge it with PEFT."
        )
    count = len(tensors["waveft_spectrum"])
    return WaveFT(count, config["scaling"], config["random_loc_seed"], "torch"), tensors


def _read_shira(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    if _INDICES not in tensors:
        raise ValueError(f"It lacks {_INDICES}, the places of its entries.")
    return SHiRA(config["r"], None), tensors | {_INDICES: to_digits(tensors[_INDICES].astype(np.int64), 3)}


# By type: the suffixes of its tensors with their numbers of axes, and what reads a module.
READ: dict[str, tuple[Mapping[str, int], Callable[[Config, Mapping[str, int], Tensors], tuple[Method, Tensors]]]] = {
    "C3A": ({"c3a_kernel": 3}, _read_c3a),
    "FOURIERFT": ({"fourierft_spectrum": 1}, _read_fourierft),
    "WAVEFT": ({"waveft_spectrum": 1}, _read_waveft),
    "SHIRA": ({"shira_weight": 1, _INDICES: 2}, _read_shira),
}


def check_entries(name: str, place: np.ndarray, sizes: Mapping[str, int]) -> None:
    """Raises unless the entries of a SHiRA are distinct ones of its module's weight.

    Arguments:
        name: of the module.
        place: of the entries, (entries, 2, digits).
        sizes: of the in axis, and of the out axis if it is known.

    Raises:
        ValueError: if an index is out of range, or a place occurs twice.
    """
    places = np.asarray(from_digits(place))
    limits = sizes.get("out", places[:, 0].max(initial=0) + 1), sizes["in"]
    if (places < 0).any() or (places >= np.array(limits)).any() or len(np.unique(places, axis=0)) < len(places):
        raise ValueError(
            f"{name}.{_INDICES} must hold distinct entries of a weight of {limits[0]} x {limits[1]}, and some are "
            "out of range, or occur twice: the file is damaged, or of another model."
        )


def check_drawn(path: str, update: Update) -> None:
    """Raises if PEFT has other random places or matrices, or another basis, than an update.

    Arguments:
        path: of the weight.
        update: of the weight.

    Raises:
        ValueError: if the places are one in each stretch of the weight, a RandLoRA has not PEFT's form, or the basis of
            a FRoD is not from a file of PEFT; the message says what to do.
    """
    method = update.method
    if isinstance(method, FRoD) and not method.peft_modules:
        raise ValueError(
            f"{path}: jlora has computed the basis V of this FRoD. PEFT computes its own from the base, the signs and "
            "order of which rounding errors decide, and U from that: its update would be another one. Keep the adapter "
            "by jlora.save, or merge it. PEFT can read a FRoD that jlora.peft.load has read from a file of PEFT."
        )
    if isinstance(method, RandLoRA) and method.matrices is None:
        raise ValueError(
            f"{path}: PEFT's RandLoRA has one small random matrix for all terms, and jlora's one for each. Merge the "
            "adapter, or train one with RandLoRA(..., matrices=(larger, smaller))."
        )
    if isinstance(method, (FourierFT, WaveFT)) and method.places != "torch":
        name = type(method).__name__
        raise ValueError(
            f"{path}: a file of PEFT holds the seed of {name}'s places and not the places, and PEFT draws others than "
            f"jlora does with places={method.places!r}. Merge the adapter, or train one with {name}(..., "
            "places='torch')."
        )


def with_places(update: Update) -> Update:
    """A SHiRA that holds its places; any other update unchanged."""
    return update.method.with_places(update) if isinstance(update.method, SHiRA) else update


def add_structured(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Gives the tensors PEFT's form, with the scale in them, and gives the fields of the configuration.

    Arguments:
        entries: the modules, of one method.
        tensors: of the modules, in the form of jlora's factors.
    """
    method = next(iter(entries.values())).factors.method
    for name, entry in entries.items():
        values, indices = f"{PREFIX}{name}.{_VALUES[type(method)]}", f"{PREFIX}{name}.{_INDICES}"
        tensors[values] = tensors[values] * tensors[values].dtype.type(entry.factors.scale)
        if indices in tensors:
            tensors[indices] = np.asarray(from_digits(tensors[indices]))
    return {"modules_to_save": None, "init_weights": True} | _fields(method, entries)


def _fields(method: Method, entries: Mapping[str, ModuleEntry]) -> dict[str, Any]:
    if isinstance(method, SHiRA):
        return {"r": shared_field(entries, "rank"), "mask_type": "random", "random_seed": None, "fan_in_fan_out": False}
    size = "block" if isinstance(method, C3A) else "n"
    sizes = {name: getattr(entry.factors.method, size) for name, entry in entries.items()}
    default = next(iter(sizes.values()))
    patterns = (exact_patterns if isinstance(method, WaveFT) else exact_endings)(sizes, default)
    if isinstance(method, C3A):
        return {"bias": "none", "block_size": default, "block_size_pattern": patterns}
    fields = {
        "bias": "none",
        "n_frequency": default,
        "n_frequency_pattern": patterns,
        "scaling": shared_field(entries, "scaling"),
        "random_loc_seed": shared_field(entries, "seed"),
        "fan_in_fan_out": is_flipped(entries),
    }
    haar = {"wavelet_family": "db1", "use_idwt": True, "proportional_parameters": False}
    return fields | haar if isinstance(method, WaveFT) else fields
