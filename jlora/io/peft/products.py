"""PEFT's updates of small matrices that are no plain product: HiRA, DeLoRA, MiSS and RandLoRA.

HiRA      W + W * (B A)
DeLoRA    W + B diag(l / (rank |a_k| |b_k|)) A diag(|W|)    |W|, the norms of W's columns, is in the file
MiSS      W + [B^T ... B^T]
RandLoRA  W + s times the sum of random products    the random matrices are in the file
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.full_weights import base_matrix
from jlora.io.peft.method_fields import is_flipped
from jlora.io.peft.module_entry import ModuleEntry, shared_field
from jlora.io.peft.targets import exact_patterns
from jlora.io.peft.tensors import Tensors
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.weight_location import ModuleOwner
from jlora.methods import DeLoRA, HiRA, LoRA, MiSS, RandLoRA
from jlora.methods._base import Method
from jlora.methods._common.hyperparameters import scale_of

METHODS = (HiRA, DeLoRA, MiSS, RandLoRA)

MATRICES = ("base_model.randlora_A", "base_model.randlora_B")  # of RandLoRA
_NORM_TOLERANCE = 1e-5  # of the norms of the base: those of another base, or rounded to 16 bits


def _read_hira(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    a = next((tensors[name] for name in ("hira_A", "hira_embedding_A") if name in tensors), None)
    if a is None or a.ndim != 2:
        raise ValueError(f"It has {sorted(tensors)}, and hira_A or hira_embedding_A with two axes was expected.")
    return HiRA(len(a)), tensors


def _read_delora(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    reach = config.get("delora_lambda") or 15.0
    return DeLoRA(len(tensors["delora_A"]), reach, config.get("module_dropout") or 0.0), tensors


def _read_miss(config: Config, sizes: Mapping[str, int], tensors: Tensors) -> tuple[Method, Tensors]:
    block, start = tensors["miss_block"], config.get("init_weights", True)
    if block.ndim == 3 or start == "bat":
        raise ValueError("init_weights = 'bat' multiplies blocks of the weight, which jlora's MiSS does not. Merge it.")
    if start == "mini":
        if "out" not in sizes or sizes["out"] % block.shape[1]:
            raise ValueError(f"mini_r = {block.shape[1]} does not divide the out size, {sizes.get('out', 'unknown')}.")
        block = np.tile(block, (1, sizes["out"] // block.shape[1]))
    rank, dropout = len(block), config.get("miss_dropout") or 0.0
    if sizes["in"] % rank == 0:
        return MiSS(rank, dropout), {"miss_block": block}
    rows = np.arange(sizes["in"]) % rank == np.arange(rank)[:, None]  # the last repetition of B is cut off
    return LoRA(rank, dropout=dropout), {
        "lora_A.weight": rows.astype(block.dtype),
        "lora_B.weight": np.ascontiguousarray(block.T),
    }


# By type: the suffixes of its tensors with their numbers of axes, and what reads a module.
READ = {
    "HIRA": ({}, _read_hira),
    "DELORA": ({"delora_A": 2, "delora_B": 2, "delora_lambda": 1, "delora_w_norm": 1}, _read_delora),
    "MISS": ({"miss_block": 2}, _read_miss),
}


def read_delora(factors: ModuleFactors, owners: list[ModuleOwner], base: BaseParams) -> ModuleFactors:
    """A module's DeLoRA if the norms in the file are those of the base in params, else the equal LoRA.

    Arguments:
        factors: a, b, l and the norms, as in the file.
        owners: the weights of the module.
        base: the base parameters.
    """
    method, arrays = factors.method, dict(factors.arrays)
    assert isinstance(method, DeLoRA)
    norm = arrays.pop("norm")
    has_base = base.leaves is not None and len(owners) == 1 and owners[0].location.num_joined == 1
    if has_base and np.allclose(norm, _row_norms(owners, base), rtol=_NORM_TOLERANCE, atol=0):
        return ModuleFactors(method, factors.scale, arrays, factors.axes)
    a, b = (arrays[name].astype(np.float64) for name in "ab")
    lengths = np.maximum(np.linalg.norm(a, axis=0), 1e-4) * np.maximum(np.linalg.norm(b, axis=1), 1e-4)
    sizes = arrays["l"].astype(np.float64) / (method.rank * lengths)
    pair = {"a": a * norm.astype(np.float64)[:, None], "b": b * sizes[:, None]}
    lora = LoRA(method.rank, dropout=method.dropout)
    return ModuleFactors(lora, 1.0, {name: f.astype(np.float32) for name, f in pair.items()}, factors.axes)


def with_norms(factors: ModuleFactors, owners: list[ModuleOwner], base: BaseParams) -> ModuleFactors:
    """DeLoRA with the norms of the base, which PEFT stores.

    Arguments:
        factors: a, b and l.
        owners: the weights of the module.
        base: the base parameters.
    """
    norm = _row_norms(owners, base).astype(factors.arrays["a"].dtype)
    return ModuleFactors(
        factors.method, factors.scale, factors.arrays | {"norm": norm}, {**factors.axes, "norm": ("in",)}
    )


def _row_norms(owners: list[ModuleOwner], base: BaseParams) -> np.ndarray:
    purpose = "PEFT stores the norms of the base beside a DeLoRA"
    return np.linalg.norm(base_matrix(owners, base, purpose).astype(np.float64), axis=1).astype(np.float32)


def read_randlora(config: Config, tensors: Tensors) -> Tensors:
    """The tensors without the copies of the random matrices that PEFT writes for every module.

    Raises:
        ValueError: if the file lacks the matrices, or a copy is another one.
    """
    missing = [name for name in MATRICES if name not in tensors]
    if missing:
        raise ValueError(
            f"The file lacks {missing}, which PEFT draws in 16 bits, of a kind that depends on the machine. Save it "
            "with save_projection=True."
        )
    for matrix in MATRICES:
        suffix = matrix.removeprefix("base_model")
        for name in [name for name in tensors if name.endswith(suffix) and name != matrix]:
            if not np.array_equal(tensors.pop(name), tensors[matrix]):
                raise ValueError(f"{name} is another matrix than {matrix}, and PEFT has one for all modules.")
    small, large = (tensors.pop(name) for name in MATRICES)
    if small.ndim != 3 or large.ndim != 3 or small.shape[:2] != (large.shape[2], 1):
        raise ValueError(f"The file has {MATRICES} of the shapes {small.shape} and {large.shape}, which do not fit.")
    return tensors | {"shared.small": small[:, 0], "shared.large": large}


def with_matrices(method: RandLoRA, tensors: Mapping[str, np.ndarray]) -> RandLoRA:
    """The method with the sizes of the random matrices.

    Arguments:
        method: the method.
        tensors: all of the file, after `read_randlora`.
    """
    return dataclasses.replace(method, matrices=(len(tensors["shared.large"]), tensors["shared.small"].shape[1]))


def with_one_rank(entries: Mapping[str, ModuleEntry], notes: list[str]) -> dict[str, ModuleEntry]:
    """HiRAs padded with zeros to the largest rank: PEFT 0.21.2 creates all of them with the rank of no pattern.

    Arguments:
        entries: the modules; those of other methods are unchanged.
        notes: to which a sentence is added for every module that changes.
    """
    ranks = {name: e.factors.method.rank for name, e in entries.items() if isinstance(e.factors.method, HiRA)}
    rank, out = max(ranks.values(), default=0), dict(entries)
    for name in [name for name in ranks if ranks[name] < rank]:
        factors, missing = entries[name].factors, (0, rank - ranks[name])
        arrays = {
            "a": np.pad(factors.arrays["a"], [(0, 0), missing]),
            "b": np.pad(factors.arrays["b"] * np.float32(_scale(entries[name])), [missing, (0, 0)]),
        }
        out[name] = entries[name]._replace(factors=ModuleFactors(HiRA(rank), 1.0, arrays, factors.axes))
        notes.append(f"{name}: rank {ranks[name]} padded to {rank}, since PEFT has one rank for all HiRAs.")
    return out


def add_products(entries: Mapping[str, ModuleEntry], tensors: Tensors) -> Config:
    """Gives the tensors PEFT's form, with the scale in them, and gives the fields of the configuration.

    Arguments:
        entries: the modules, of one method.
        tensors: of the modules, in the form of jlora's factors.
    """
    method = next(iter(entries.values())).factors.method
    for name, entry in entries.items():
        for suffix in ("hira_B", "hira_embedding_B", "delora_lambda", "miss_block", "randlora_lambda"):
            key = f"{PREFIX}{name}.{suffix}"
            if key in tensors:
                tensors[key] = tensors[key] * tensors[key].dtype.type(_scale(entry))
    return {"init_weights": True, "modules_to_save": None} | _fields(method, entries, tensors)


def _scale(entry: ModuleEntry) -> float:
    """What PEFT has no field for."""
    method = entry.factors.method
    own = scale_of(method.alpha, method.rank) if isinstance(method, HiRA) else 1.0
    return entry.factors.scale * own


def _matrices_of_peft(method: RandLoRA, entries: Mapping[str, ModuleEntry]) -> tuple[np.ndarray, np.ndarray]:
    """The random matrices in the sizes that PEFT derives from the modules, cut off or padded with zeros.

    PEFT takes the largest in size and the largest out size of all modules, and each module uses leading parts of the
    matrices that are not larger than these sizes.
    """
    arrays = next(iter(entries.values())).factors.arrays
    locations = [entry.location for entry in entries.values()]
    smaller, larger = sorted((max(at.count("in") for at in locations), max(at.count("out") for at in locations)))
    shapes = (method.rank, smaller), (larger, -(-smaller // method.rank), method.rank)
    small, large = (_resized(arrays[name], shape) for name, shape in zip(("small", "large"), shapes, strict=True))
    return small[:, None], large


def _resized(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    part = array[tuple(map(slice, shape))]
    return np.pad(part, [(0, size - have) for size, have in zip(shape, part.shape, strict=True)])


def _fields(method: Method, entries: Mapping[str, ModuleEntry], tensors: Tensors) -> dict[str, Any]:
    ranks = {name: entry.factors.size("rank") for name, entry in entries.items()}
    rank = next(iter(ranks.values()))
    patterns = {"r": rank, "rank_pattern": exact_patterns(ranks, rank)}
    match method:
        case HiRA():
            return {"r": rank, "rank_pattern": {}, "hira_dropout": 0.0, "fan_in_fan_out": is_flipped(entries)}
        case DeLoRA():
            return patterns | {
                "bias": "none",
                "delora_lambda": shared_field(entries, "reach"),
                "lambda_pattern": {},
                "module_dropout": shared_field(entries, "dropout"),
            }
        case MiSS():
            shared = {"r": shared_field(entries, "rank"), "miss_dropout": shared_field(entries, "dropout")}
            return shared | {"bias": "none", "mini_r": 1}
    assert isinstance(method, RandLoRA)
    for matrix, array in zip(MATRICES, _matrices_of_peft(method, entries), strict=True):
        modules = [f"{PREFIX}{name}{matrix.removeprefix('base_model')}" for name in entries]
        tensors |= dict.fromkeys((matrix, *modules), array)  # PEFT expects a copy in every module
    return {
        "bias": "none",
        "fan_in_fan_out": is_flipped(entries),
        "projection_prng_key": method.seed,
        "r": method.rank,
        "randlora_alpha": method.rank if method.alpha is None else method.alpha,
        "randlora_dropout": 0.0,
        "save_projection": True,
        "sparse": False,
        "very_sparse": False,
    }
