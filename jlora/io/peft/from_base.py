"""Methods whose frozen arrays PEFT computes from the base when it loads a file, and does not store."""

from collections.abc import Mapping

import numpy as np

from jlora.io.peft.absent import has_arrays_from_base
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.frod import basis_products
from jlora.io.peft.full_weights import base_matrix
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.products import with_norms
from jlora.io.torch.weight_location import Owners
from jlora.methods import OSF, DeLoRA, FRoD, KaSA
from jlora.methods._base import Method

PURPOSE = "PEFT computes the singular vectors of the method from the base"
_TOLERANCE = 1e-3  # of the largest entry: those of another decomposition


def arrays_from_base(method: Method, weight: np.ndarray, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The frozen arrays of KaSA, OSF or FRoD.

    Arguments:
        method: one of these.
        weight: the base, (in, out).
        arrays: those that the file has.
    """
    if isinstance(method, FRoD):
        return basis_products(weight, arrays["v"])
    assert isinstance(method, (KaSA, OSF))
    u, values, v = np.linalg.svd(np.asarray(weight, np.float32), full_matrices=False)
    last, first = slice(-method.rank, None), slice(None, -method.rank)
    if isinstance(method, KaSA):
        return {"u": u[:, last] * values[last], "v": v[last]}
    leading = {"h": u[:, first]} if len(u) > v.shape[1] else {"k": v[first]} if len(u) < v.shape[1] else {}
    return {"u0": u[:, last], "s0": values[last], "v0": v[last], **leading}


def checked_against_base(
    entries: Mapping[str, ModuleEntry], owners: Owners, base: BaseParams
) -> dict[str, ModuleEntry]:
    """The same modules, whose frozen arrays are those that PEFT will compute.

    Arguments:
        entries: the modules.
        owners: of all modules.
        base: the base parameters.

    Raises:
        ValueError: if the base is missing, or the frozen arrays are not those of the base of the module.
    """
    checked = dict(entries)
    for name, entry in entries.items():
        method = entry.factors.method
        if isinstance(method, DeLoRA):
            checked[name] = entry._replace(factors=with_norms(entry.factors, owners[name], base))
            continue
        if not has_arrays_from_base(method):
            continue
        arrays = entry.factors.arrays
        new = _removed(dict(arrays) | arrays_from_base(method, base_matrix(owners[name], base, PURPOSE), arrays))
        if np.abs(new - _removed(arrays)).max() > _TOLERANCE * np.abs(new).max():
            raise ValueError(
                f"{name} has other singular vectors than its base in params, and PEFT computes them from the base: "
                "pass the parameters that the adapter was initialised with, or convert it by jlora.to_lora."
            )
    return checked


def _removed(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the frozen arrays take from the weight; of FRoD all of it."""
    if "l0" in arrays:
        return arrays["v"] @ (arrays["l0"][:, None] * arrays["u"])
    return arrays["u"] @ arrays["v"] if "s0" not in arrays else (arrays["u0"] * arrays["s0"]) @ arrays["v0"]
