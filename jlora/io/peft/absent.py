"""Which arrays of a method PEFT's files do not hold for each module."""

from collections.abc import Mapping

import numpy as np

from jlora.methods import C3A, OSF, BDLoRA, DeLoRA, FourierFT, FRoD, GraLoRA, KaSA, RandLoRA, SHiRA, WaveFT
from jlora.methods._base import Method

# Arrays that PEFT computes from the base when it loads a file.
_FROM_BASE: dict[type[Method], tuple[str, ...]] = {
    KaSA: ("u", "v"),
    OSF: ("u0", "s0", "v0", "h", "k"),
    FRoD: ("u", "l0"),
}
# Methods whose blocks, places or singular vectors are those of a whole module, not of a part of it or of several.
WHOLE_MODULES: tuple[type[Method], ...] = (
    *(BDLoRA, GraLoRA, KaSA, OSF, FRoD, C3A, FourierFT, WaveFT, SHiRA, DeLoRA, RandLoRA),
)

# The tensors of a module whose rank is 0: all pruned by AdaLoRA, or kept by OSF.
_EMPTY = {
    "ADALORA": {"lora_A", "lora_B", "lora_E"},
    "OSF": {"osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"},
}


def check_empty(peft_type: str, name: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises unless a module of rank 0 has the tensors of its type, all of them empty."""
    missing, shapes = _EMPTY[peft_type] - set(tensors), {suffix: tensor.shape for suffix, tensor in tensors.items()}
    if missing or set(tensors) - _EMPTY[peft_type] or any(tensor.size for tensor in tensors.values()):
        raise ValueError(f"{name} has rank 0 by the rank_pattern: missing {sorted(missing)}, in the file {shapes}.")


def has_arrays_from_base(method: Method) -> bool:
    """Whether PEFT computes arrays of a method from the base when it loads a file."""
    return type(method) in _FROM_BASE


def needs_base(method: Method) -> bool:
    """Whether what is written of a method depends on the base."""
    return has_arrays_from_base(method) or bool(stored_axes(method))


def stored_axes(method: Method) -> dict[str, tuple[str, ...]]:
    """The axes of what the tensors of a module have beside the arrays of the method: DeLoRA's norms of the base."""
    return {"norm": ("in",)} if isinstance(method, DeLoRA) else {}


def absent_arrays(method: Method) -> tuple[str, ...]:
    """The arrays that the tensors of a module lack: shared by all modules, or computed from the base."""
    return (*method.shared_arrays, *_FROM_BASE.get(type(method), ()))
