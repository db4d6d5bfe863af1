"""PEFT's rotations and projections: OFT, BOFT, HRA, RoAd, DEFT and PaRa."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jlora.io.peft import products, structured
from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.tensors import Tensors
from jlora.methods import BOFT, DEFT, HRA, OFT, PaRa, RoAd
from jlora.methods._base import Method, Update

METHODS = (OFT, BOFT, HRA, RoAd, DEFT, PaRa)


def is_map(config: Config) -> bool:
    """Whether a configuration is of a type of this file, of `structured.py` or of `products.py`."""
    return config["peft_type"] in _READ


def method_and_tensors(config: Config, name: str, tensors: Tensors, sizes: Mapping[str, int]) -> tuple[Method, Tensors]:
    """The method of a module, and its tensors in the form of jlora's factors.

    Arguments:
        config: the configuration.
        name: of the module.
        tensors: of the module, by suffix.
        sizes: of the in axis, and of the out axis if it is known.

    Raises:
        ValueError: if a tensor is missing or has the wrong number of axes, or PEFT's method differs from jlora's.
    """
    ranks, read = _READ[config["peft_type"]]
    for suffix, ndim in ranks.items():
        if suffix in tensors and tensors[suffix].ndim != ndim:
            raise ValueError(f"{name}.{suffix} has shape {tensors[suffix].shape}, and {ndim} axes were expected.")
    first = next(iter(ranks), None)
    if first is not None and first not in tensors:
        raise ValueError(f"{name} lacks {first}: it has {sorted(tensors)}.")
    try:
        return read(config, sizes, dict(tensors))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read. {error}") from error


def _read_oft(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    weight = tensors["oft_R.weight"]
    block = round((1 + (1 + 8 * weight.shape[1]) ** 0.5) / 2)
    terms = config.get("num_cayley_neumann_terms", 5) if config["use_cayley_neumann"] else 0
    if config["use_cayley_neumann"] and terms < 3:
        raise ValueError(f"num_cayley_neumann_terms = {terms} gives no rotation: 3 or more are needed.")
    is_of_peft = {"peft_version", "layers_to_transform"} & config.keys()
    if terms and is_of_peft and _is_before(config.get("peft_version"), 0, 18):
        raise ValueError(
            "use_cayley_neumann = True, and PEFT before 0.18 computes another rotation from it than later ones do: "
            "merge the adapter with the PEFT that trained it; if that was 0.18 or later, set peft_version in the file."
        )
    eps = config.get("eps") if config.get("coft") else None
    method = OFT(block, bool(config.get("block_share")), eps, max(terms, 4) if terms else 0)  # PEFT's 3 are its 4
    return method, {"oft_R.weight": -weight if terms else weight}  # PEFT's series is of the inverse rotation


def _is_before(version: Any, *release: int) -> bool:
    """Whether a version is before a release. PEFT records its version since 0.18; jlora's files have few fields."""
    numbers = re.match(r"(\d+)\.(\d+)", str(version))
    return numbers is None or tuple(map(int, numbers.groups())) < release


def _read_boft(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    matrices = tensors["boft_R"]
    levels, _, block, _ = matrices.shape
    if levels > 2:
        raise ValueError(f"It has {levels} levels, and PEFT's levels after the second join other blocks than jlora's.")
    rows, columns = np.triu_indices(block, 1)
    skew = (matrices - matrices.swapaxes(-1, -2)) / 2
    return BOFT(block, levels), tensors | {"boft_R": skew[..., rows, columns]}


def _read_hra(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    u = tensors["hra_u"]
    if config.get("apply_GS"):  # reflections along an orthonormal basis
        u = np.linalg.qr(u.astype(np.promote_types(u.dtype, np.float32)))[0]
    return HRA(u.shape[1]), {"hra_u": u}


def _read_road(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    variants = {f"road_{k}": k for k in (1, 2, 4)}
    if config["variant"] not in variants:
        raise ValueError(f"The variant is {config['variant']!r}; it must be one of {', '.join(variants)}.")
    return RoAd(variants[config["variant"]], config["group_size"]), tensors


def _read_deft(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    p, projection = tensors["deft_P"], config.get("decomposition_method", "relu")
    rank = p.shape[1]
    if projection == "qr":
        tensors["deft_P"] = np.linalg.qr(p.astype(np.promote_types(p.dtype, np.float32)))[0]
    if config.get("para"):
        return PaRa(rank, projection, offset=False), tensors
    return DEFT(rank, config.get("alpha") or None, projection), tensors


# By type: the suffixes of its tensors with their numbers of axes, and what reads a module.
_Reader = Callable[[Config, Mapping[str, int], Tensors], tuple[Method, Tensors]]
_READ: dict[str, tuple[Mapping[str, int], _Reader]] = {
    "OFT": ({"oft_R.weight": 2}, _read_oft),
    "BOFT": ({"boft_R": 4, "boft_s": 2}, _read_boft),
    "HRA": ({"hra_u": 2}, _read_hra),
    "ROAD": ({"road_theta": 1, "road_alpha": 1}, _read_road),
    "DEFT": ({"deft_P": 2, "deft_R": 2}, _read_deft),
    **structured.READ,
    **products.READ,
}


def has_map(update: Update) -> bool:
    """Whether PEFT has this update without a conversion, if its method is one of this file.

    PEFT has one scale for a rotation by angles alone: that of the angles.
    """
    match update.method:
        case HRA() | DEFT() | PaRa():
            return float(update.scale) == 1
        case BOFT():
            return update.method.levels <= 2
    return True


def add_maps(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Gives the tensors PEFT's form, with the scale in them, and gives the fields of the configuration.

    Arguments:
        entries: the modules, of one method.
        tensors: of the modules, in the form of jlora's factors.
    """
    method = next(iter(entries.values())).factors.method
    for name, entry in entries.items():
        _write_module(f"{PREFIX}{name}.", entry, tensors)
    fields: Config = {"init_weights": True, "modules_to_save": None} | _fields(method, entries)
    return fields if isinstance(method, RoAd) else fields | {"bias": "none"}


def _fields(method: Method, entries: Mapping[str, ModuleEntry]) -> dict[str, Any]:
    counts = {entry.location.count("in") / getattr(entry.factors.method, "block", 1) for entry in entries.values()}
    blocks = {getattr(entry.factors.method, "block", 1) for entry in entries.values()}
    by_count = isinstance(method, OFT) and len(blocks) > len(counts) == 1  # PEFT has one size, or one number, of blocks
    others = ("offset", "block") if by_count else ("offset",)
    shared = {field: shared_field(entries, field) for field in vars(method) if field not in others}
    match method:
        case OFT():
            return {
                "r": int(counts.pop()) if by_count else 0,
                "oft_block_size": shared.get("block", 0),
                "block_share": shared["shared"],
                "coft": shared["eps"] is not None,
                "eps": 6e-5 if shared["eps"] is None else shared["eps"] * _shared_scale(entries),
                "use_cayley_neumann": shared["neumann_terms"] > 0,
                "num_cayley_neumann_terms": shared["neumann_terms"] or 5,
                "module_dropout": 0.0,
                "fan_in_fan_out": False,
                "peft_version": "0.21.2",  # by which PEFT knows that it has this series
            }
        case BOFT():
            factors = shared["levels"]
            return {
                "boft_block_size": shared["block"],
                "boft_block_num": 0,
                "boft_n_butterfly_factor": factors,
                "boft_dropout": 0.0,
                "fan_in_fan_out": False,
            }
        case HRA():
            return {"r": shared["rank"], "apply_GS": False}
        case RoAd():
            return {"variant": f"road_{shared['variant']}", "group_size": shared["group"]}
    return {
        "r": shared["rank"],
        "alpha": shared.get("alpha"),
        "decomposition_method": shared["projection"],
        "para": isinstance(method, PaRa),
        "deft_dropout": 0.0,
        "init_scale": 1.0,
        "fan_in_fan_out": any(entry.location.module.kind == "conv1d" for entry in entries.values()),
    }


def _shared_scale(entries: Mapping[str, ModuleEntry]) -> float:
    """The absolute scale of all modules: PEFT limits the angles after it, and jlora before."""
    scales = {name: abs(entry.factors.scale) for name, entry in entries.items()}
    if len(set(scales.values())) > 1:
        raise ValueError(
            f"PEFT has one limit (eps) of OFT for all modules, and the scales of the adapter are {scales}: use one "
            "scale, or save the modules as several adapters."
        )
    return next(iter(scales.values()))


def _write_module(prefix: str, entry: ModuleEntry, tensors: Tensors) -> None:
    """Changes the tensors of one module to PEFT's form."""
    method, scale = entry.factors.method, np.float32(entry.factors.scale)

    def change(suffix: str, fn: Callable[[np.ndarray], np.ndarray]) -> None:
        before = tensors[prefix + suffix]
        tensors[prefix + suffix] = np.ascontiguousarray(fn(before).astype(before.dtype))

    match method:
        case OFT():
            change("oft_R.weight", lambda q: (-scale if method.neumann_terms else scale) * q)
        case BOFT():
            change("boft_R", lambda q: scale * _antisymmetric(q, method.block))
            change("boft_s", lambda s: 1 + scale * (s - 1))
        case RoAd():
            change("road_theta", lambda theta: scale * theta)
            change("road_alpha", lambda alpha: 1 + scale * (alpha - 1))
        case DEFT() if method.projection == "qr":  # R in the orthogonal basis that PEFT computes from P
            triangle = np.linalg.qr(tensors[f"{prefix}deft_P"].astype(np.float32))[1]
            change("deft_R", lambda r: triangle @ r)


def _antisymmetric(angles: np.ndarray, block: int) -> np.ndarray:
    rows, columns = np.triu_indices(block, 1)
    matrices = np.zeros((*angles.shape[:-1], block, block), angles.dtype)
    matrices[..., rows, columns] = angles
    return matrices - matrices.swapaxes(-1, -2)
