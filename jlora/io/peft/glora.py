"""GLoRA in PEFT's files: one form for the gain and the shift of all modules, and three more arrays for the bias.

W + W * A + B,    b + D b + E + W C    with torch's weights, (out, in)
"""

from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.full_weights import base_matrix
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.tensors import Tensors
from jlora.io.torch.factor_layout import FlatAxes, ModuleFactors
from jlora.io.torch.weight_location import Owners
from jlora.methods import GLoRA

BIAS_SUFFIXES = ("glora_C", "glora_D", "glora_E")
_FORMS = ("none", "constant", "vector", "lora")  # each has those before it as special cases
_ARRAYS = {"gain": ("g", "ga", "gb"), "shift": ("h", "a", "b")}
_PURPOSE = "GLoRA's C and D multiply the weight and the bias"


def read_glora(config: Config, tensors: Tensors) -> Tensors:
    """The tensors with one array for each of C, D and E, without the zeros that PEFT writes for what is not there.

    Raises:
        ValueError: if such a tensor is not zero.
    """
    for name in [name for name in tensors if name.endswith(".zeros")]:
        if tensors.pop(name).any():
            raise ValueError(f"{name} is not zero, and PEFT writes zeros there: the file is damaged.")
        if name.endswith((".glora_A.zeros", ".glora_B.zeros")):  # neither a gain nor a shift
            tensors[f"{name.removesuffix('zeros')}X"] = np.zeros(1, np.float32)
    for name in [name for name in tensors if name.endswith(".glora_C.Xd")]:
        down, up = tensors.pop(name), tensors.pop(f"{name.removesuffix('d')}u", None)
        if up is None or down.shape[1:] != up.shape[:1]:
            raise ValueError(f"{name} has shape {down.shape}, and no glora_C.Xu that fits it.")
        tensors[name.removesuffix(".Xd")] = down @ up
    of_bias = tuple(f".{suffix}.X" for suffix in BIAS_SUFFIXES)
    for name in [name for name in tensors if name.endswith(of_bias)]:
        tensors[name.removesuffix(".X")] = tensors.pop(name)
    return tensors


def glora_method(config: Config) -> GLoRA:
    """The method of a configuration."""
    form = config.get("config_A_B", "lora")
    form = "constant" if form == "none" else form
    return GLoRA(config.get("r", 8), form, form)


def bias_changes(
    adapters: Mapping[str, Tensors], trained: Tensors, owners: Owners, base: BaseParams
) -> tuple[dict[str, Tensors], Tensors]:
    """The tensors of each module without C, D and E, and by module what these add to the bias.

    Arguments:
        adapters: for every adapted module its tensors by suffix, after `read_glora`.
        trained: the parameters that the file has in full; a bias among them replaces that of the base.
        owners: of all modules.
        base: the base parameters.

    Raises:
        ValueError: if the base is needed and missing, or the sizes do not fit.
    """
    others, changes = {}, {}
    for name, tensors in adapters.items():
        others[name] = {suffix: tensor for suffix, tensor in tensors.items() if suffix not in BIAS_SUFFIXES}
        c, d, e = (tensors.get(suffix, np.zeros(1, np.float32)).reshape(-1) for suffix in BIAS_SUFFIXES)
        parts = [e]
        if c.any():
            parts.append(c @ base_matrix(owners[name], base, _PURPOSE))
        if d.any():
            bias = trained.get(f"{name}.bias")
            if bias is None and f"{name}.bias" in owners:
                bias = base_matrix(owners[f"{name}.bias"], base, _PURPOSE)
            parts.append(d if bias is None else d * bias)
        if any(part.any() for part in parts):  # without a bias in the map this is refused later
            size = sum(owner.location.count("out") for owner in owners.get(f"{name}.bias", []))
            changes[name] = np.sum(np.broadcast_arrays(*parts, np.zeros(size or 1, np.float32)), axis=0)
    return others, changes


def with_one_form(entries: Mapping[str, ModuleEntry], notes: list[str]) -> dict[str, ModuleEntry]:
    """The modules with one form of the gains and the shifts of all: the simplest that has all of them.

    A vector has low rank: one column of ones times the vector. Ranks are padded with zeros.

    Arguments:
        entries: the modules; those of other methods are unchanged.
        notes: to which a sentence is added for every module that changes.
    """
    methods = {name: e.factors.method for name, e in entries.items() if isinstance(e.factors.method, GLoRA)}
    forms = {form for method in methods.values() for form in (method.gain, method.shift)}
    form = next((form for form in reversed(_FORMS) if form in forms), "constant")
    rank = max((m.rank for m in methods.values() if "lora" in (m.gain, m.shift)), default=1)
    out = dict(entries)
    for name, method in methods.items():
        new = GLoRA(rank if form == "lora" else method.rank, form, form)
        out[name] = entries[name]._replace(factors=_converted(entries[name], method, new))
        if (method.gain, method.shift) != (form, form):
            notes.append(f"{name}: GLoRA's gain and shift became {form!r}, since PEFT has one form for both.")
    return out


def _converted(entry: ModuleEntry, old: GLoRA, new: GLoRA) -> ModuleFactors:
    factors, form = entry.factors, new.gain
    n_in, n_out = entry.location.count("in"), factors.size("out") or entry.location.count("out")
    arrays: dict[str, np.ndarray] = {}
    axes: dict[str, FlatAxes] = {}
    for part, (vector, down, up) in _ARRAYS.items():
        old_form, scale = getattr(old, part), factors.scale
        if old_form == "lora":
            missing = new.rank - old.rank
            value = {
                down: np.pad(factors.arrays[down], [(0, 0), (0, missing)]),
                up: scale * np.pad(factors.arrays[up], [(0, missing), (0, 0)]),
            }
        else:
            zero = np.zeros((), np.float32)
            number = scale * (zero if old_form == "none" else factors.arrays[vector])
            value = {vector: number if form == "constant" else np.broadcast_to(number, (n_out,))}
            if form == "lora":
                ones, rows = np.zeros((n_in, new.rank), np.float32), np.zeros((new.rank, n_out), np.float32)
                ones[:, 0], rows[0] = 1, value[vector]
                value = {down: ones, up: rows}
        arrays |= {name: array.astype(np.float32) for name, array in value.items()}
        axes |= {vector: () if form == "constant" else ("out",), down: ("in", "rank"), up: ("rank", "out")}
    return ModuleFactors(new, 1.0, arrays, {name: axes[name] for name in arrays})


def add_glora(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Adds the zeros that PEFT has for C, D and E, and gives the fields; what trains the bias is in `bias`."""
    for name, entry in entries.items():
        n_in, n_out = entry.location.count("in"), entry.factors.size("out") or entry.location.count("out")
        for suffix, shape in zip(BIAS_SUFFIXES, ((n_in, 1), (n_out,), (n_out,)), strict=True):
            tensors[f"{PREFIX}{name}.{suffix}.zeros"] = np.zeros(shape, np.float32)
    return {
        "bias": "none",
        "config_A_B": shared_field(entries, "gain"),
        "config_C": "none",
        "config_D_E": "none",
        "init_weights": True,
        "modules_to_save": None,
        "r": shared_field(entries, "rank"),
    }
