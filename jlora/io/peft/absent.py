"""Which arrays of a method PEFT's files do not hold for each module."""

from jlora.methods import C3A, OSF, BDLoRA, FourierFT, FRoD, GraLoRA, KaSA, SHiRA, WaveFT
from jlora.methods._base import Method

# Arrays that PEFT computes from the base when it loads a file.
_FROM_BASE: dict[type[Method], tuple[str, ...]] = {
    KaSA: ("u", "v"),
    OSF: ("u0", "s0", "v0", "h", "k"),
    FRoD: ("u", "l0"),
}
# Methods whose blocks, places or singular vectors are those of a whole module, not of a part of it or of several.
WHOLE_MODULES: tuple[type[Method], ...] = (BDLoRA, GraLoRA, KaSA, OSF, FRoD, C3A, FourierFT, WaveFT, SHiRA)


def needs_base(method: Method) -> bool:
    """Whether files of a method are relative to the base."""
    return type(method) in _FROM_BASE


def absent_arrays(method: Method) -> tuple[str, ...]:
    """The arrays that the tensors of a module lack: shared by all modules, or computed from the base."""
    return (*method.shared_arrays, *_FROM_BASE.get(type(method), ()))
