"""VeRA in PEFT's files: the two random matrices that all modules share."""

import functools
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.method_fields import is_flipped
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.tensors import Tensors
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.methods import LoRA, VeRA
from jlora.methods._common.torch_random import Generator
from jlora.methods.vera import shared_matrices

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


def read_vera(
    name: str, factors: ModuleFactors, n_in: int, n_out: int, tensors: Mapping[str, np.ndarray]
) -> ModuleFactors:
    """A module's VeRA if the file has the matrices that jlora draws from the seed, else the equal LoRA.

        W + A diag(d) B diag(b)  =  W + (A diag(d)) (B diag(b))

    Arguments:
        name: of the module.
        factors: d and b, as in the file.
        n_in, n_out: the sizes of the module's weight.
        tensors: all of the file.

    Raises:
        ValueError: if the file lacks the matrices, or they do not fit.
    """
    method = factors.method
    assert isinstance(method, VeRA)
    a, b = _stored_matrices(name, (n_in, n_out, method.rank), tensors)
    drawn = _matrices(method.seed, a.shape[1], len(b), method.rank)
    d, axes = factors.arrays["d"], factors.axes
    if all(np.array_equal(stored, matrix) for stored, matrix in zip((a, b), drawn, strict=True)):
        return ModuleFactors(method, 1.0, {**factors.arrays, "d": for_own_width(d, a.shape[1], n_in)}, axes)
    lora = LoRA(method.rank, dropout=method.dropout)
    arrays = {"a": a[:, :n_in].T * d, "b": b[:n_out].T * factors.arrays["b"]}
    return ModuleFactors(lora, 1.0, arrays, {"a": ("in", "rank"), "b": ("rank", "out")})


def drawn_projections(config: Config, names: tuple[str, str], n_in: int, n_out: int) -> Tensors:
    """The random matrices that PEFT draws if the file leaves them out (`save_projection=False`), by name.

    Arguments:
        config: the configuration, of VeRA or of PVeRA, whose first matrix has two halves.
        names: of the two.
        n_in, n_out: the largest in size and out size of the adapted modules.
    """
    generator, rank = Generator(config["projection_prng_key"]), config["r"]
    rows = 2 * rank if config["peft_type"] == "PVERA" else rank
    a, b = (generator.kaiming_uniform(shape) for shape in ((rows, n_in), (n_out, rank)))
    return dict(zip(names, (a, b), strict=True))


def _stored_matrices(
    name: str, sizes: tuple[int, int, int], tensors: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The random matrices in a file.

    Raises:
        ValueError: if the file lacks them, or they are too small for a module's in size, out size and rank.
    """
    missing = [key for key in PROJECTIONS if key not in tensors]
    if missing:
        raise ValueError(
            f"The file lacks {missing}, the random matrices that all its weights share. Save it with "
            "save_projection=True."
        )
    a, b = (tensors[key] for key in PROJECTIONS)
    n_in, n_out, rank = sizes
    is_matrix = a.ndim == b.ndim == 2
    if not is_matrix or len(a) != rank or b.shape[1] != rank or a.shape[1] < n_in or len(b) < n_out:
        raise ValueError(
            f"The file's vera_A {a.shape} and vera_B {b.shape} do not fit {name}, {n_in} x {n_out} of rank {rank}."
        )
    return a, b


@functools.lru_cache(1)
def _matrices(seed: int, n_in: int, n_out: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """jlora's matrices for a seed, as the file has them."""
    a, b = shared_matrices(seed, n_in, n_out, rank)
    return np.asarray(a).T, np.asarray(b).T


def for_shared_width(d: np.ndarray, widest: int, n_in: int) -> np.ndarray:
    """VeRA's d for one matrix A of the largest width: jlora scales A to the width of each weight."""
    return d * d.dtype.type(np.sqrt(widest / n_in))


def for_own_width(d: np.ndarray, widest: int, n_in: int) -> np.ndarray:
    """The inverse of `for_shared_width`, to the last bit if there is such a number."""
    quotient = d / d.dtype.type(np.sqrt(widest / n_in))
    best = quotient
    for direction in (np.inf, -np.inf):
        neighbour = np.nextafter(quotient, d.dtype.type(direction))
        best = np.where(for_shared_width(best, widest, n_in) == d, best, neighbour)
    return np.where(for_shared_width(best, widest, n_in) == d, best, quotient)


def add_vera(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Adds the random matrices to the tensors, scales d and b to them, and gives the fields of the configuration."""
    rank, seed = shared_field(entries, "rank"), shared_field(entries, "seed")
    widest, highest = (max(entry.location.count(role) for entry in entries.values()) for role in ("in", "out"))
    for name, entry in entries.items():
        d, b = (f"{PREFIX}{name}.vera_lambda_{factor}" for factor in "db")
        tensors[d] = for_shared_width(tensors[d], widest, entry.location.count("in"))
        tensors[b] = tensors[b] * tensors[b].dtype.type(entry.factors.scale)
    tensors |= zip(PROJECTIONS, _matrices(seed, widest, highest, rank), strict=True)
    return {
        "bias": "none",
        "d_initial": shared_field(entries, "d_initial"),
        "fan_in_fan_out": is_flipped(entries),
        "init_weights": True,
        "modules_to_save": None,
        "projection_prng_key": seed,
        "r": rank,
        "save_projection": True,
        "vera_dropout": shared_field(entries, "dropout"),
    }
