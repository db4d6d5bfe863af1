"""Weights that are trained whole, in PEFT's files: biases, modules to save, rows of embeddings."""

from collections.abc import Mapping

import numpy as np

from jlora.io.peft import config as _peft_config
from jlora.io.peft import tensors as _peft_tensors
from jlora.io.peft.deltas import Base
from jlora.io.peft.tensors import Tensors, sizes_of, written
from jlora.io.torch.factor_layout import TERMS, Part, Piece, divide, kind
from jlora.io.torch.module_names import Owner
from jlora.methods import Full
from jlora.methods._base import Update


def read(name: str, tensor: np.ndarray, own: list[Owner]) -> Piece:
    """A parameter that is in the file as a whole."""
    place = own[0].place
    full = kind(Full(), place.is_matrix)
    _, spelled = _peft_tensors.form(full, place.module.kind, name)["d"]
    sizes = sizes_of(own)
    if place.experts:
        raise ValueError(f"{name} is a trained weight with an axis of experts; jlora reads adapters of those alone.")
    value = _peft_tensors.read(tensor, TERMS[full]["d"], spelled, sizes, name)
    return Piece(Full(), 1.0, {"d": value})


def _base_piece(own: Owner, base: Base, why: str) -> np.ndarray:
    place = own.place
    value = base.value(place.path, place.weight.shape, why)
    update = Update({"d": value}, Full(), place.weight.roles, place.weight.shape)
    piece = divide(update, place)[own.at][own.piece]
    assert piece is not None
    return piece.flat["d"]


def read_rows(name: str, tensor: np.ndarray, config: _peft_config.Config, own: list[Owner], base: Base) -> Piece:
    """An embedding with its trained rows."""
    rows = _peft_config.token_rows(config)
    if isinstance(rows, dict):
        rows = next((v for k, v in rows.items() if name == k or name.endswith(f".{k}")), None)
    value = _base_piece(own[0], base, "the file holds trained rows, and jlora's adapter differences")
    if not rows or tensor.shape != (len(rows), value.shape[-1]) or not all(0 <= k < len(value) for k in rows):
        raise ValueError(f"{name} has rows of shape {tensor.shape} for the tokens {rows} of {value.shape}.")
    value = value.copy()
    value[rows] = tensor.astype(value.dtype)
    return Piece(Full(), 1.0, {"d": value})


def check_base(name: str, tensor: np.ndarray, own: list[Owner], base: Base) -> None:
    value = _base_piece(own[0], base, f"the file holds the base weight of {name} too")
    stored = read(name, tensor, own).flat["d"]
    if not np.array_equal(stored.astype(value.dtype), value):
        raise ValueError(
            f"The file holds the base weight of {name}, and it is another than {own[0].place.path} in params: PEFT "
            "would replace it. Load that base, resized or trained as it was."
        )


def _rows(name: str, part: Part, base: Base) -> tuple[list[int], np.ndarray]:
    """The trained rows of an embedding."""
    place = part.place
    value = part.piece.flat["d"]
    weight = base.value(place.path, place.weight.shape, "").reshape(value.shape)
    rows = np.flatnonzero((value != weight.astype(value.dtype)).any(1))
    return rows.tolist(), value[rows]


def tokens_alone(tokens: Mapping[str, Part], base: Base) -> tuple[_peft_config.Config, Tensors]:
    """A file of trained tokens."""
    found = {name: _rows(name, part, base) for name, part in tokens.items()}
    rows = next(iter(found.values()))[0]
    if not rows or any(r != rows for r, _ in found.values()):
        raise ValueError(f"PEFT trains the same tokens in all of {sorted(tokens)}; here they differ or are none.")
    config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": sorted(tokens), "token_indices": rows}
    config |= {"base_model_name_or_path": None, "inference_mode": True, "init_weights": True, "task_type": None}
    return config, {f"{_peft_config.PREFIX}{name}.trainable_tokens_delta": value for name, (_, value) in found.items()}


def add_tokens(config: _peft_config.Config, tensors: Tensors, tokens: Mapping[str, Part], base: Base) -> None:
    if not tokens:
        return
    _needs_lora(config, tokens)
    found = {name: _rows(name, part, base) for name, part in tokens.items()}
    found = {name: (rows, value) for name, (rows, value) in found.items() if rows}
    config["trainable_token_indices"] = {name: rows for name, (rows, _) in sorted(found.items())} or None
    for name, (_, value) in found.items():
        tensors[f"{_peft_config.PREFIX}{name}.token_adapter.trainable_tokens_delta"] = value


def _needs_lora(config: _peft_config.Config, parts: Mapping[str, Part]) -> None:
    if config["peft_type"] != "LORA":
        raise ValueError(f"PEFT trains {sorted(parts)} with LoRA alone, and the adapter has {config['peft_type']}.")


def add_trained(
    config: _peft_config.Config, tensors: Tensors, trained: Mapping[str, Part], adapted: Mapping[str, Part]
) -> None:
    """Weights that are trained whole: biases, and modules with all that they hold."""
    saved = {name for name, part in trained.items() if part.place.is_matrix}
    saved |= {name.removesuffix(".weight") for name in trained if name.endswith(".weight")}
    strange = [n for n, p in trained.items() if not p.place.is_matrix and not n.endswith((".weight", ".bias"))]
    if strange:
        raise ValueError(f"PEFT saves whole modules, and {strange} are parameters of their own: leave them out.")
    biases = {}
    for name, part in trained.items():
        ((suffix, value),) = written(name, part).items()
        module = name.removesuffix(".bias")
        if name == module or module in saved:
            tensors[f"{_peft_config.PREFIX}{name}.{suffix}".removesuffix(".")] = value
        else:
            biases[name] = module in adapted
            tensors[_peft_config.PREFIX + (f"{module}.base_layer.bias" if module in adapted else name)] = value
    if biases:
        if config["peft_type"] not in ("LORA", "VERA"):
            _needs_lora(config, {name: trained[name] for name in biases})
        own = "vera_only" if config["peft_type"] == "VERA" else "lora_only"
        config["bias"] = own if all(biases.values()) else "all"
    if saved:
        config["modules_to_save"] = sorted(saved)
