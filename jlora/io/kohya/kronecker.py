"""LoKr in files of LyCORIS: which of jlora's Kronecker products has such factors."""

import numpy as np

from jlora.io.kohya.content import ModuleContent, layout
from jlora.io.peft.layouts import Layout
from jlora.io.torch.weight_location import WeightLocation
from jlora.methods import LoKr
from jlora.methods._common.factor_axes import WeightAxes

_MAJOR = layout(c=("lokr_w1", "out_major in_major"))
_MAJOR_LOW = layout(ca=("lokr_w1_b", "major_rank in_major"), cb=("lokr_w1_a", "out_major major_rank"))
_MINOR = layout(d=("lokr_w2", "out_minor in_minor window"))
_MINOR_LOW = layout(a=("lokr_w2_b", "rank (in_minor window)"), b=("lokr_w2_a", "out_minor rank"))
_MINOR_TUCKER = layout(
    core=("lokr_t2", "rank core_rank window"), a=("lokr_w2_b", "core_rank in_minor"), b=("lokr_w2_a", "rank out_minor")
)
LAYOUTS: list[Layout] = [
    {**first, **second} for first in (_MAJOR, _MAJOR_LOW) for second in (_MINOR, _MINOR_LOW, _MINOR_TUCKER)
]

Arrays = dict[str, np.ndarray]


def content(stored: Layout, arrays: Arrays, alpha: float | None) -> ModuleContent:
    """The content of a module, with a method for a weight that has no other axes than the file's.

    Arguments:
        stored: the layout of the tensors, one of `LAYOUTS`.
        arrays: by factor.
        alpha: the numerator of the scale; None makes the scale 1.

    Raises:
        ValueError: if the tensors do not fit.
    """
    ranks = {len(arrays[name]) for name in ("ca", "b" if "core" in arrays else "a") if name in arrays}
    if len(ranks) > 1:
        raise ValueError(f"its two factors have the ranks {sorted(ranks)}, and LoKr has one.")
    rank = next(iter(ranks), None)
    if "core" in arrays:
        stored, arrays = {**(_MAJOR if "c" in arrays else _MAJOR_LOW), **_MINOR}, _without_core(arrays)
    major = max(_majors(arrays))
    if rank is None or "ca" in arrays or "a" in arrays:
        return ModuleContent(LoKr(rank, rank and alpha, major, "ca" in arrays), stored, arrays)
    return ModuleContent(LoKr(None, None, major), stored, arrays, 1.0 if alpha is None else alpha / rank)


def _majors(arrays: Arrays) -> tuple[int, int]:
    """The sizes of C: in and out."""
    if "c" in arrays:
        return arrays["c"].shape[1], arrays["c"].shape[0]
    return arrays["ca"].shape[1], arrays["cb"].shape[0]


def fit(read: ModuleContent, location: WeightLocation) -> ModuleContent:
    """The content with a method whose factors for a weight are those of the file.

    If jlora would give a factor another form (whole or of low rank), both are multiplied out: the same product.

    Raises:
        ValueError: if the product divides the axes of the weight in a way that no LoKr of jlora does.
    """
    method, arrays = read.method, read.arrays
    assert isinstance(method, LoKr)
    axes, majors = WeightAxes(*location.weight), _majors(arrays)
    totals = axes.count("*channels"), axes.count("*out")
    minors = [total // major for total, major in zip(totals, majors, strict=True) if major]
    for factor in (-1, max(majors), *minors):
        candidate = LoKr(method.rank, method.alpha, factor, method.decompose_both)
        sizes = candidate.sizes(axes)
        if (sizes["in_major"], sizes["out_major"]) != majors:
            continue
        if candidate.factors_for(axes).keys() == arrays.keys():
            return read._replace(method=candidate)
        scale = read.scale if method.rank is None else (method.alpha or method.rank) / method.rank
        return _whole(arrays, scale, factor, location.kernel[1:])
    raise ValueError(
        f"its Kronecker product has a first factor of {majors[1]} x {majors[0]}, and no LoKr of jlora divides "
        f"{location.path} {location.weight.shape} so: jlora's LoKr splits both sizes by one factor. Merge the adapter "
        "with LyCORIS, or train it without unbalanced factorisation."
    )


def _whole(arrays: Arrays, scale: float, factor: int, window: tuple[int, ...]) -> ModuleContent:
    """A Kronecker product of two whole factors."""
    major = arrays["c"] if "c" in arrays else _product(arrays["cb"], arrays["ca"])
    minor = arrays["d"] if "d" in arrays else _product(arrays["b"], arrays["a"])
    if window and "d" not in arrays:
        minor = minor.reshape(len(minor), -1, *window)
    return ModuleContent(LoKr(None, None, factor), {**_MAJOR, **_MINOR}, {"c": major, "d": minor}, scale)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    if left.shape[1:] != right.shape[:1]:
        raise ValueError(f"its factors have the shapes {left.shape} and {right.shape}, which do not fit.")
    dtype = np.promote_types(left.dtype, np.float32)
    return left.astype(dtype) @ right.astype(dtype)


def _without_core(arrays: Arrays) -> Arrays:
    """D multiplied out of its Tucker form: `sum_rs core[r, s, *window] b[r, out] a[s, in]`."""
    core, a, b = (arrays[name].astype(np.float32) for name in ("core", "a", "b"))
    if core.shape[:2] != (len(b), len(a)):
        raise ValueError(f"its lokr_t2 {core.shape}, lokr_w2_a {b.shape} and lokr_w2_b {a.shape} do not fit.")
    minor = np.einsum("rs...,ro,si->oi...", core, b, a)
    return {name: array for name, array in arrays.items() if name not in ("core", "a", "b")} | {"d": minor}
