"""Adapters whose start changes the base in PEFT: their update of the original base.

    W' = W - s A0 B0,    W' + s A B  =  W + s [A A0] [B; -B0]

A0 and B0 follow from W (PiSSA, OLoRA), or are in the file that was saved before training.
"""

import dataclasses

import numpy as np

from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.join_modules import total_scale
from jlora.methods import DoRA, LoRA

# Values of init_lora_weights: A0 and B0 follow from W, or from a file.
FROM_BASE, FROM_FILE = ("pissa", "olora"), ("corda", "lora_ga")


def start_of(start: str, weight: np.ndarray, factors: ModuleFactors, *, is_transposed: bool) -> ModuleFactors:
    """A0 and B0 for a weight.

        PiSSA    s A0 B0 = the nearest matrix of the adapter's rank
        OLoRA    A0, B0  = the leading rows and columns of R and Q, torch's weight being Q R

    Arguments:
        start: one of `FROM_BASE`.
        weight: of the module, (in, out).
        factors: the trained factors of the module.
        is_transposed: whether torch's weight is (out, in).
    """
    wide = weight.astype(np.float64)
    rank, scale = factors.arrays["a"].shape[1], total_scale(factors)
    if start == "pissa":
        u, values, vt = np.linalg.svd(wide, full_matrices=False)
        a, b = u[:, :rank] * values[:rank], vt[:rank] / scale
    elif is_transposed:
        q, r = np.linalg.qr(wide.T)
        a, b = r[:rank].T, q[:, :rank].T
    else:
        q, r = np.linalg.qr(wide)
        a, b = q[:, :rank], r[:rank]
    return dataclasses.replace(factors, arrays={**factors.arrays, "a": a, "b": b})


def minus_start(factors: ModuleFactors, start: ModuleFactors) -> ModuleFactors:
    """The update of the original base: a LoRA, or DoRA, of the sum of both ranks.

    Arguments:
        factors: the trained factors of a module.
        start: those before training, of the same module and scale.
    """
    method, scale = factors.method, total_scale(factors)
    assert isinstance(method, (LoRA, DoRA))
    arrays = dict(factors.arrays)
    for name, axis, sign in (("a", "rank", 1), ("b", "rank", -1)):
        one, other = factors.arrays[name], sign * start.arrays[name]
        dtype = np.promote_types(one.dtype, np.float32)
        arrays[name] = np.concatenate([one.astype(dtype), other.astype(dtype)], factors.axes[name].index(axis))
    rank = arrays["a"].shape[factors.axes["a"].index("rank")]
    return dataclasses.replace(
        factors, method=type(method)(rank, scale * rank, dropout=method.dropout), scale=1.0, arrays=arrays
    )
