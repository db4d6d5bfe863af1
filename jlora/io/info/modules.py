"""What one torch module holds: its summary, from the factors as they are in a file."""

import math
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from jlora._adapter.summary import UpdateSummary
from jlora.io.peft.absent import stored_axes
from jlora.io.peft.layouts import Layout, axis_groups
from jlora.methods import Full, LoCon, LoHa, LoKr, LoRA
from jlora.methods._base import Method

Arrays = Mapping[str, np.ndarray]


M = TypeVar("M", bound=Method, covariant=True)


class FileFactors(NamedTuple, Generic[M]):
    """The factors of a module as a file has them.

    Arguments:
        method: the method.
        layout: the suffix of each factor, and its axes in the file.
        arrays: by factor.
        scale: what multiplies the update beside the method's own scale.
        has_norm: whether the norm of the change is to be computed.
        has_shape: whether the sizes of the factors determine the shape of the weight.
    """

    method: M
    layout: Layout
    arrays: Arrays
    scale: float = 1.0
    has_norm: bool = True
    has_shape: bool = True


def summarize(name: str, factors: FileFactors[Method]) -> UpdateSummary:
    """The summary of one module."""
    of_base = stored_axes(factors.method)
    trained = [array for factor, array in factors.arrays.items() if factor not in (*factors.method.frozen, *of_base)]
    numbers, size = sum(array.size for array in trained), sum(array.nbytes for array in factors.arrays.values())
    rank = getattr(factors.method, "rank", None)
    norm = change_norm(factors) if factors.has_norm else None
    return UpdateSummary(name, factors.method, rank, weight_shape(factors), numbers, size, norm)


def weight_shape(factors: FileFactors[Method]) -> tuple[int, ...]:
    """The shape of torch's weight, or what of it the factors have: (out, in, *window), experts first.

    Raises:
        ValueError: if the factors disagree on a size.
    """
    if not factors.has_shape:
        return ()
    sizes = _axis_sizes(factors.layout, factors.arrays, getattr(factors.method, "rank", None) or 1)
    for side in ("in", "out"):  # of a Kronecker product
        if f"{side}_minor" in sizes:
            sizes[side] = (math.prod(sizes.get(f"{side}_major", (1,))) * sizes[f"{side}_minor"][0],)
    kernel = sizes.get("kernel") or sizes.get("in") or sizes.get("channels", ())
    return (*sizes.get("experts", ()), *sizes.get("out", ()), *kernel, *sizes.get("window", ()))


def fits(layout: Layout, by_suffix: Arrays, rank: int) -> bool:
    """Whether tensors have the axes of a layout, with one size for each axis and the given rank."""
    try:
        return _axis_sizes(layout, {f: by_suffix[row.suffix] for f, row in layout.items()}, rank)["rank"] == (rank,)
    except ValueError:
        return False


def _axis_sizes(layout: Layout, arrays: Arrays, rank: int) -> dict[str, tuple[int, ...]]:
    """The size of every axis that the factors have; several numbers for the spatial axes of a convolution.

    Raises:
        ValueError: if the factors have other axes, or disagree.
    """
    sizes: dict[str, tuple[int, ...]] = {"rank": (rank,)}
    for factor, array in arrays.items():
        groups, shape = axis_groups(layout[factor].axes), array.shape
        for position, group in enumerate(groups):
            joined = rank if "rank" in group and len(group) > 1 else 1
            name = next((name for name in group if name != "rank"), "rank")
            is_open = name in ("kernel", "window", "1...")
            size = shape[position:] if is_open else shape[position : position + 1]
            if (size and size[0] % joined) or not (size or is_open):
                raise ValueError(f"{factor} has shape {shape}")
            size = tuple(n // joined for n in size)
            expected = (1,) * len(size) if name in ("1", "1...") else sizes.setdefault(name, size)
            if size != expected:
                raise ValueError(f"{factor} has shape {shape}, and its {name} is {expected} elsewhere")
        if len(shape) > len(groups) and groups[-1] not in (["kernel"], ["window"], ["1..."]):
            raise ValueError(f"{factor} has shape {shape}")
    return sizes


def change_norm(factors: FileFactors[Method]) -> float | None:
    """|W' - W|, in float64; None if it depends on the weight."""
    with np.errstate(all="ignore"):  # of files with infinite numbers the norm is not a number
        arrays = {name: array.astype(np.float64) for name, array in factors.arrays.items()}
        norm = _unscaled_norm(factors.method, arrays)
        return None if norm is None else float(abs(_scale(factors.method, arrays) * factors.scale) * norm)


def _scale(method: Method, arrays: Arrays) -> float:
    """The method's own scale."""
    if isinstance(method, LoHa):
        return method.product.scale
    if isinstance(method, LoKr):
        is_low = len(arrays) > 2
        return method.alpha / method.rank if is_low and method.alpha and method.rank else 1.0
    return method.scale


def _unscaled_norm(method: Method, arrays: Arrays) -> float | None:
    match method:
        case LoRA():
            return _norm_of_product(*_pairs(method.rank, arrays["a"], arrays["b"]))
        case LoHa():
            first, second = (_flat(arrays[f"b{k}"]) @ _flat(arrays[f"a{k}"]) for k in range(2))
            return float(np.linalg.norm(first * second))
        case LoKr():
            major = arrays["c"] if "c" in arrays else arrays["cb"] @ arrays["ca"]
            minor = arrays["d"] if "d" in arrays else _flat(arrays["b"]) @ _flat(arrays["a"])
            return float(np.linalg.norm(major) * np.linalg.norm(minor))
        case LoCon() if "core" in arrays:
            core = arrays["core"].reshape(*arrays["core"].shape[:2], -1)
            a, b = _flat(arrays["a"]), _flat(arrays["b"])
            square = np.einsum("cd,crw,rs,dsw->", b.T @ b, core, a @ a.T, core, optimize=True)
            return math.sqrt(max(square, 0.0))
        case LoCon():
            return _norm_of_product(_flat(arrays["a"])[None], _flat(arrays["b"])[None])
        case Full():
            return float(np.linalg.norm(arrays["d"]))
    return None


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(len(array), -1)


def _pairs(rank: int, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(experts, rank, in) and (experts, out, rank); PEFT joins experts with the rank, and a module has one pair."""
    experts = len(a) // rank
    return a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).transpose(2, 0, 1)


def _norm_of_product(a: np.ndarray, b: np.ndarray) -> float:
    """|B A|, from the inner products of the rows of A and of the columns of B."""
    square = np.sum((a @ a.swapaxes(1, 2)) * (b.swapaxes(1, 2) @ b))
    return math.sqrt(max(square, 0.0)) if np.isfinite(square) else math.nan
