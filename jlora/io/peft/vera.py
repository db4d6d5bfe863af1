"""VeRA in PEFT's files: the two random matrices that all modules share."""

import functools
from collections.abc import Mapping

import numpy as np

from jlora.io.peft import config as _peft_config
from jlora.io.peft.tensors import Sizes, Tensors
from jlora.io.torch.factor_layout import Part, Piece, common
from jlora.methods import LoRA, VeRA
from jlora.methods.vera import shared

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def read(method: VeRA, name: str, flat: Tensors, sizes: Sizes, tensors: Tensors) -> Piece:
    """VeRA where the matrices are those that jlora draws from the seed, else the equal LoRA."""
    n_in, n_out = sizes.letters["i"], sizes.letters["o"]
    missing = [key for key in PROJECTIONS if key not in tensors]
    if missing:
        raise ValueError(f"The file lacks {missing}, the random matrices that all its weights share.")
    a, b = (tensors[key] for key in PROJECTIONS)
    if a.ndim != 2 or b.ndim != 2 or (len(a), b.shape[1]) != (method.rank,) * 2 or a.shape[1] < n_in or len(b) < n_out:
        raise ValueError(
            f"The file's vera_A {a.shape} and vera_B {b.shape} are too small for {name}, {n_in} x {n_out}."
        )
    own = _drawn(method.seed, a.shape[1], len(b), method.rank)
    if all(np.array_equal(x, y) for x, y in zip((a, b), own, strict=True)):
        return Piece(method, 1.0, {**flat, "d": unscaled(flat["d"], a.shape[1], n_in)})
    lora = LoRA(method.rank, dropout=method.dropout)
    return Piece(lora, 1.0, {"a": a[:, :n_in].T * flat["d"], "b": b[:n_out].T * flat["b"]})


@functools.lru_cache(1)
def _drawn(seed: int, n_in: int, n_out: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """jlora's matrices for a seed as the file has them."""
    a, b = shared(seed, n_in, n_out, rank)
    return np.asarray(a).T, np.asarray(b).T


def scaled(d: np.ndarray, widest: int, n_in: int) -> np.ndarray:
    """VeRA's d for one matrix that all widths share: jlora scales the matrix to each weight's width."""
    return d * d.dtype.type(np.sqrt(widest / n_in))


def unscaled(d: np.ndarray, widest: int, n_in: int) -> np.ndarray:
    """The inverse of `scaled`, to the last bit where there is such a number."""
    start = d / d.dtype.type(np.sqrt(widest / n_in))
    best = start
    for step in (np.inf, -np.inf):
        near = np.nextafter(start, d.dtype.type(step))
        best = np.where(scaled(best, widest, n_in) == d, best, near)
    return np.where(scaled(best, widest, n_in) == d, best, start)


def write(modules: Mapping[str, Part], tensors: Tensors) -> _peft_config.Config:
    """Adds the random matrices, and gives the configuration."""
    rank, seed = common(modules, "rank"), common(modules, "seed")
    widest, highest = (max(part.place.count(role) for part in modules.values()) for role in ("in", "out"))
    for name, part in modules.items():
        d, b = (f"{_peft_config.PREFIX}{name}.vera_lambda_{x}" for x in "db")
        tensors[d] = scaled(tensors[d], widest, part.place.count("in"))
        tensors[b] = tensors[b] * tensors[b].dtype.type(part.piece.scale)
    tensors |= zip(PROJECTIONS, _drawn(seed, widest, highest, rank), strict=True)
    return {
        "bias": "none",
        "d_initial": common(modules, "d_initial"),
        "fan_in_fan_out": any(part.place.module.kind == "conv1d" for part in modules.values()),
        "init_weights": True,
        "modules_to_save": None,
        "projection_prng_key": seed,
        "r": rank,
        "save_projection": True,
        "vera_dropout": common(modules, "dropout"),
    }
