"""Types of PEFT whose files hold more than one tensor for each factor of a module, or tensors that all modules share.

A file of such a type is read in two steps: here its tensors get the form of one tensor for each factor, and those that
all modules share the names of `shared_name`; then the table of layouts applies, as for all types.
"""

import collections
import re
from collections.abc import Callable, Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.form_methods import sparsity_for_peft
from jlora.io.peft.frod import add_frod, apart, read_frod
from jlora.io.peft.glora import read_glora
from jlora.io.peft.method_fields import is_flipped
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.monteclora import without_state
from jlora.io.peft.products import read_randlora
from jlora.io.peft.pvera import divided
from jlora.io.peft.tensors import Tensors
from jlora.io.peft.tinylora import cut_tinylora, read_tinylora
from jlora.io.peft.trained_vectors import biases_as_output_biases, norms_as_saved_modules
from jlora.methods import OSF, FRoD, GraLoRA, KaSA, PEANuT, SuperTuning, TinyLoRA, UniLoRA, VBLoRA
from jlora.methods._base import Update
from jlora.methods._common.digits import count_digits, from_digits, to_digits

METHODS = (FRoD, SuperTuning, TinyLoRA, VBLoRA, UniLoRA, PEANuT)

_ROOT = "base_model."
_INDICES = re.compile(r"(.*\.unilora_)(indices|scales)(_[AB])")
_LAYERS = re.compile(r"(.*\.peanut_(?:encoders|decoders))\.(\d+)\.weight")


def shared_name(factor: str) -> str:
    """The name of a tensor that all modules share, after `one_tensor_each`."""
    return f"shared.{factor}"


def is_shared_name(name: str) -> bool:
    """Whether a tensor is one that all modules share."""
    return name.startswith("shared.")


def one_tensor_each(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """The configuration and the tensors of a file, with one tensor for each factor.

    Raises:
        ValueError: if the file lacks tensors, or does not tell to which modules they belong.
    """
    match config["peft_type"]:
        case "LN_TUNING":
            return norms_as_saved_modules(config, tensors)
        case "BEFT":
            return biases_as_output_biases(config, tensors)
    convert = without_state if config.get("monteclora_config") else _READ.get(config["peft_type"])
    if convert is None:
        return config, tensors
    try:
        converted = convert(config, dict(tensors))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"The file lacks a tensor, an index in it is out of range, or its configuration has no number in the place "
            f"of one, {error}: save it again with PEFT."
        ) from error
    if integers := [name for name, tensor in converted.items() if np.issubdtype(tensor.dtype, np.integer)]:
        raise ValueError(f"{integers[0]} holds integers, and no factor of {config['peft_type']} does.")
    return config, converted


def has_integers(config: Config) -> bool:
    """Whether files of a type hold integers: indices."""
    return config["peft_type"] in ("VBLORA", "UNILORA", "SUPERTUNING", "FROD", "SHIRA")


def _read_vblora(config: Config, tensors: Tensors) -> Tensors:
    bank = tensors.pop(f"{_ROOT}vblora_vector_bank", None)
    if bank is None:
        raise ValueError("The file lacks base_model.vblora_vector_bank, the vectors that all its modules share.")
    topk = [name for name in tensors if name.endswith("_topk_indices")]
    if bool(topk) != bool(config.get("save_only_topk_weights")):
        raise ValueError(
            f"The file has {'the topk weights alone' if topk else 'all logits'}, and save_only_topk_weights = "
            f"{bool(config.get('save_only_topk_weights'))}: write {bool(topk)} into adapter_config.json."
        )
    for name in topk:
        stem = name.removesuffix("_topk_indices")
        places, weights = tensors.pop(name).astype(np.int64), tensors.pop(f"{stem}_topk_weights")
        last = np.maximum(1 - weights.sum(-1, keepdims=True), np.finfo(weights.dtype).tiny)
        # The logits that are not stored may have any value below: so low that they stay out, and finite.
        logits = np.full((*places.shape[:-1], len(bank)), -100, weights.dtype)
        np.put_along_axis(logits, places, np.log(np.concatenate([weights, last], -1)), -1)
        tensors[stem] = logits
    return tensors | {shared_name("bank"): bank}


def _read_unilora(config: Config, tensors: Tensors) -> Tensors:
    theta = tensors.pop(f"{_ROOT}unilora_theta_d", None)
    indices = [name for name in tensors if "unilora_indices_" in name]
    if theta is None or not indices:
        raise ValueError(
            "The file lacks base_model.unilora_theta_d, or the indices of its modules, which PEFT draws in the order "
            "of torch's modules. Save it with save_indices=True."
        )
    norm = np.zeros_like(theta)
    pairs = {n: (tensors[n].astype(np.int64), tensors.pop(_INDICES.sub(r"\1scales\3", n))) for n in indices}
    for name, (places, scales) in pairs.items():
        if places.shape != scales.shape or (places < 0).any():
            raise ValueError(f"{name} has shape {places.shape} and its scales {scales.shape}, or negative indices.")
        norm[places] = scales
        tensors[name] = to_digits(places, count_digits(len(theta)))
    for name, (places, scales) in pairs.items():
        if (norm[places] != scales).any():
            raise ValueError(f"The scales of {name} differ from others for one index: the file is damaged.")
    return tensors | {shared_name("theta"): theta, shared_name("norm"): norm}


def _read_super_tuning(config: Config, tensors: Tensors) -> Tensors:
    missing = [n for n in tensors if n.endswith("_values") and n.replace("_values", "_indices") not in tensors]
    if missing:
        raise ValueError(f"The file lacks the indices of {missing[0]}: save it with save_precomputed_indices=True.")
    return {n: to_digits(t.astype(np.int64), 4) if n.endswith("_indices") else t for n, t in tensors.items()}


def _read_peanut(config: Config, tensors: Tensors) -> Tensors:
    layers: dict[str, dict[int, np.ndarray]] = collections.defaultdict(dict)
    for name in list(tensors):
        if match := _LAYERS.fullmatch(name):
            layers[match[1]][int(match[2])] = tensors.pop(name)
    for name, by in layers.items():
        if len({layer.shape for layer in by.values()}) > 1:
            raise ValueError(f"The layers of {name} have several shapes: {[by[k].shape for k in sorted(by)]}.")
    return tensors | {name: np.stack([by[k] for k in sorted(by)]) for name, by in layers.items()}


_READ: dict[str, Callable[[Config, Tensors], Tensors]] = {
    "TINYLORA": read_tinylora,
    "VBLORA": _read_vblora,
    "UNILORA": _read_unilora,
    "PEANUT": _read_peanut,
    "PVERA": divided,
    "SUPERTUNING": _read_super_tuning,
    "FROD": read_frod,
    "RANDLORA": read_randlora,
    "GLORA": read_glora,
}


def has_form(update: Update) -> bool:
    """Whether PEFT has this update without a conversion, if its method is one of this file."""
    is_unscaled = float(update.scale) == 1
    match update.method:
        case TinyLoRA():
            return update.method.tied and is_unscaled
        case VBLoRA():
            sides = update.axes.count("*in"), update.axes.count("*out")
            return is_unscaled and not any(side % update.method.length for side in sides)
        case UniLoRA() | SuperTuning() | FRoD() | GraLoRA() | KaSA() | OSF():
            return is_unscaled
    return True


def with_indices(update: Update) -> Update:
    """A UniLoRA that holds its indices, and a FRoD that shares nothing; any other update unchanged."""
    if isinstance(update.method, FRoD):
        return apart(update)
    return update.method.with_indices(update) if isinstance(update.method, UniLoRA) else update


def add_form(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Gives the tensors the form of the type, adds those that all modules share, and gives the configuration.

    Arguments:
        entries: the modules, of one method.
        tensors: of the modules, one for each factor.
    """
    first = next(iter(entries.values())).factors
    if isinstance(first.method, FRoD):
        return add_frod(entries, tensors)
    method, shared = first.method, {name: first.arrays[name] for name in first.method.shared_arrays}
    fields: Config = {"modules_to_save": None, "r": shared_field(entries, "rank")}
    initialised, flipped = {"init_weights": True}, {"bias": "none", "fan_in_fan_out": is_flipped(entries)}
    match method:
        case SuperTuning():
            return fields | initialised | _write_super_tuning(method, entries, tensors)
        case PEANuT():
            return fields | initialised | _write_peanut(entries, tensors)
        case TinyLoRA():
            tensors[f"{_ROOT}tinylora_v.0"] = shared["v"]
            cut_tinylora(entries, tensors)
            return (
                fields
                | initialised
                | flipped
                | {
                    "save_projection": True,
                    "tinylora_dropout": method.dropout,
                    "u": method.size,
                    "weight_tying": 1.0,
                }
            )
        case VBLoRA():
            tensors[f"{_ROOT}vblora_vector_bank"] = shared["bank"]
            return (
                fields
                | flipped
                | {
                    "num_vectors": method.vectors,
                    "topk": method.topk,
                    "vblora_dropout": method.dropout,
                    "vector_length": method.length,
                }
            )
        case UniLoRA():
            _write_unilora(tensors, shared)
            return (
                fields
                | initialised
                | flipped
                | {
                    "save_indices": True,
                    "theta_d_length": method.length,
                    "unilora_dropout": method.dropout,
                }
            )
    raise TypeError(f"{type(method).__name__} has no form of its own.")


def _write_super_tuning(method: SuperTuning, entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    for name in [name for name in tensors if name.endswith(".supertuning_indices")]:
        tensors[name] = np.asarray(from_digits(tensors[name]))
    scale = shared_field(entries, "alpha")
    return {
        "lora_alpha": method.rank if method.rank and scale is None else scale,
        "save_precomputed_indices": True,
        "select_top": shared_field(entries, "largest"),
        "sparsity": sparsity_for_peft(entries),
    }


def _write_unilora(tensors: Tensors, shared: Mapping[str, np.ndarray]) -> None:
    for name in [name for name in tensors if _INDICES.fullmatch(name)]:
        places = np.asarray(from_digits(tensors[name])).astype(np.int64)
        tensors[name] = places
        tensors[_INDICES.sub(r"\1scales\3", name)] = shared["norm"][places]
    tensors[f"{_ROOT}unilora_theta_d"] = shared["theta"]


def _write_peanut(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    for name in [name for name in tensors if name.endswith((".peanut_encoders", ".peanut_decoders"))]:
        layers = tensors.pop(name)
        tensors |= {f"{name}.{k}.weight": np.ascontiguousarray(layer) for k, layer in enumerate(layers)}
    scales = {entry.factors.scale for entry in entries.values()}
    for name, entry in entries.items():  # PEFT has one scale: B takes what a module's differs by
        if len(scales) > 1:
            key = f"{PREFIX}{name}.peanut_B.weight"
            tensors[key] = tensors[key] * tensors[key].dtype.type(entry.factors.scale)
    return {
        "act_fn": shared_field(entries, "activation"),
        "depth": shared_field(entries, "depth"),
        "scaling": shared_field(entries, "scaling") * (scales.pop() if len(scales) == 1 else 1.0),
    }
