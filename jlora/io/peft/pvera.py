"""PVeRA in PEFT's files: the two random matrices that all modules share, the first of twice the rank."""

from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.method_fields import is_flipped
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.tensors import Tensors
from jlora.io.peft.vera import for_own_width, for_shared_width
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.methods import LoRA, PVeRA
from jlora.methods.vera import shared_matrices

MATRICES = ("base_model.pvera_A", "base_model.pvera_B")


def divided(config: Config, tensors: Tensors) -> Tensors:
    """The tensors with the vector of both halves of the first matrix as two.

    Raises:
        ValueError: if the file lacks the matrices.
    """
    missing = [name for name in MATRICES if name not in tensors]
    if missing and config.get("save_projection", True):
        raise ValueError(f"The file lacks {missing}, which all its modules share. Save it with save_projection=True.")
    for name in [name for name in tensors if name.endswith(".pvera_lambda_d")]:
        if len(tensors[name]) % 2:
            raise ValueError(f"{name} has length {len(tensors[name])}, and it is two vectors in one: an even length.")
        tensors[name], tensors[f"{name[:-1]}c"] = np.split(tensors[name], 2)
    return tensors


def read_pvera(factors: ModuleFactors, n_in: int, tensors: Mapping[str, np.ndarray]) -> ModuleFactors:
    """A module's PVeRA if the file has the matrices that jlora draws from the seed, else the LoRA that its mean is.

    Arguments:
        factors: d, c and b, as in the file.
        n_in: the in size of the module's weight.
        tensors: all of the file.
    """
    method = factors.method
    assert isinstance(method, PVeRA)
    a, b = (tensors[name] for name in MATRICES)
    drawn = _matrices(method.seed, a.shape[1], len(b), method.rank)
    arrays = factors.arrays
    if all(np.array_equal(stored, matrix) for stored, matrix in zip((a, b), drawn, strict=True)):
        vectors = {name: for_own_width(arrays[name], a.shape[1], n_in) for name in "dc"}
        return ModuleFactors(method, 1.0, arrays | vectors, factors.axes)
    lora = LoRA(method.rank, dropout=method.dropout)
    pair = {
        "a": a[: method.rank, :n_in].T * arrays["d"][None],
        "b": b[: len(arrays["b"])].T * arrays["b"][None],
    }
    return ModuleFactors(lora, 1.0, pair, {"a": ("in", "rank"), "b": ("rank", "out")})


def _matrices(seed: int, n_in: int, n_out: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """jlora's matrices for a seed, as the file has them."""
    a, b = shared_matrices(seed, n_in, n_out, rank, halves=2)
    return np.asarray(a).T, np.asarray(b).T


def add_pvera(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Adds the random matrices to the tensors, scales d, c and b to them, and gives the fields of the configuration."""
    rank, seed = shared_field(entries, "rank"), shared_field(entries, "seed")
    widest, highest = (max(entry.location.count(role) for entry in entries.values()) for role in ("in", "out"))
    for name, entry in entries.items():
        d, c, b = (f"{PREFIX}{name}.pvera_lambda_{factor}" for factor in "dcb")
        both = np.concatenate([tensors[d], tensors.pop(c)])
        tensors[d] = for_shared_width(both, widest, entry.location.count("in"))
        tensors[b] = tensors[b] * tensors[b].dtype.type(entry.factors.scale)
    tensors |= zip(MATRICES, _matrices(seed, widest, highest, rank), strict=True)
    return {
        "bias": "none",
        "d_initial": shared_field(entries, "d_initial"),
        "fan_in_fan_out": is_flipped(entries),
        "init_weights": True,
        "modules_to_save": None,
        "projection_prng_key": seed,
        "pvera_dropout": shared_field(entries, "dropout"),
        "r": rank,
        "save_projection": True,
    }
