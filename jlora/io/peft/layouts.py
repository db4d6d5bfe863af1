"""What PEFT calls the factors of each method, and the order of their axes in its files: one row a method.

Each factor has its suffix in the file and its axes there, by the names of `ModuleFactors.axes`, in the file's order:

    (rank in)   one axis of the file, which joins several
    kernel      the in axis: of a convolution the channels and every spatial axis, else one axis
    window      every spatial axis of a convolution; no axis of other modules
    1           an axis of size 1
    1...        as many axes of size 1 as a convolution has spatial axes
"""

from collections.abc import Mapping
from typing import NamedTuple

from jlora.io.torch.factor_layout import FlatAxes
from jlora.io.torch.module_names import Kind
from jlora.methods import (
    BOFT,
    C3A,
    DEFT,
    HRA,
    IA3,
    OFT,
    OSF,
    BDLoRA,
    DeLoRA,
    DoRA,
    FourierFT,
    FRoD,
    Full,
    GLoRA,
    GraLoRA,
    HiRA,
    KaSA,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    MonteCLoRA,
    PaRa,
    PEANuT,
    PVeRA,
    QALoRA,
    RandLoRA,
    RoAd,
    SHiRA,
    SuperTuning,
    TinyLoRA,
    UniLoRA,
    VBLoRA,
    VeRA,
    WaveFT,
)
from jlora.methods._base import Method


class FactorInFile(NamedTuple):
    """A factor in a file: the suffix of its name, and its axes."""

    suffix: str
    axes: str


Layout = Mapping[str, FactorInFile]


def _layout(**factors: tuple[str, str]) -> Layout:
    return {factor: FactorInFile(*row) for factor, row in factors.items()}


_LORA = _layout(a=("lora_A.weight", "rank kernel"), b=("lora_B.weight", "out rank 1..."))
_EMBEDDING = _layout(a=("lora_embedding_A", "rank in"), b=("lora_embedding_B", "out rank"))
_EXPERTS = _layout(a=("lora_A.weight", "(experts rank) in"), b=("lora_B.weight", "out (rank experts)"))
EARLIER_EXPERTS = _layout(b=("lora_A.weight", "(experts rank) out"), a=("lora_B.weight", "in (rank experts)"))
_MAGNITUDE = _layout(m=("lora_magnitude_vector", "out"))
_CONV_MAGNITUDE = _layout(m=("lora_magnitude_vector", "1 out 1..."))
_LOHA = _layout(
    b0=("hada_w1_a", "out rank"), a0=("hada_w1_b", "rank in"), b1=("hada_w2_a", "out rank"), a1=("hada_w2_b", "rank in")
)
_LOKR_FIRST = _layout(c=("lokr_w1", "out_major in_major"))
_LOKR_FIRST_LOW_RANK = _layout(ca=("lokr_w1_b", "major_rank in_major"), cb=("lokr_w1_a", "out_major major_rank"))
_LOKR_SECOND = _layout(d=("lokr_w2", "out_minor in_minor window"))
_LOKR_SECOND_LOW_RANK = _layout(a=("lokr_w2_b", "rank (in_minor window)"), b=("lokr_w2_a", "out_minor rank"))
_LOKR: list[Layout] = [
    {**first, **second}
    for first in (_LOKR_FIRST, _LOKR_FIRST_LOW_RANK)
    for second in (_LOKR_SECOND, _LOKR_SECOND_LOW_RANK)
]
_VERA = _layout(d=("vera_lambda_d", "rank"), b=("vera_lambda_b", "out"))
_HRA = _layout(u=("hra_u", "in rank"))
_PARA = _layout(p=("deft_P", "out rank"))
_DEFT = {**_PARA, **_layout(r=("deft_R", "rank in"))}
_IA3 = [_layout(l=("ia3_l", "out 1")), _layout(l=("ia3_l", "1 channels"))]
_CONV_IA3 = [_layout(l=("ia3_l", "1 out 1...")), _layout(l=("ia3_l", "1 channels 1..."))]

_TINYLORA = _layout(
    a=("tinylora_A", "in_rank in"), b=("tinylora_B", "out out_rank"), p=("tinylora_P", "size out_rank in_rank")
)
_VBLORA = _layout(a=("vblora_logits_A", "rank in_pieces vectors"), b=("vblora_logits_B", "out_pieces rank vectors"))
_UNILORA = _layout(a_index=("unilora_indices_A", "rank in digits"), b_index=("unilora_indices_B", "out rank digits"))
_SUPER = _layout(s=("supertuning_values", "entries"), place=("supertuning_indices", "entries digits"))
_SUPRA = _layout(a=("supertuning_lora_A.weight", "rank in"), b=("supertuning_lora_B.weight", "out rank"))
_FROD = _layout(
    l=("frod_lambda_l", "column"),
    s=("frod_lambda_s_values", "entries"),
    v=("frod_V", "in column"),
    place=("frod_s_indices", "entries digits"),
)
_PVERA = _layout(d=("pvera_lambda_d", "rank"), c=("pvera_lambda_c", "rank"), b=("pvera_lambda_b", "out"))
_SAMPLER = _layout(
    spread=("lora_monteclora_sampler.std_prior", "rank"),
    mixture=("lora_monteclora_sampler.expert_weights_prior", "samples"),
)
_PEANUT = _layout(a=("peanut_A.weight", "rank out"), b=("peanut_B.weight", "out rank"))
_PEANUT_LAYERS = _layout(
    encoders=("peanut_encoders", "depth width rank"), decoders=("peanut_decoders", "depth width rank")
)

_HIRA = _layout(a=("hira_A", "rank kernel"), b=("hira_B", "out rank 1..."))
_HIRA_EMBEDDING = _layout(a=("hira_embedding_A", "rank in"), b=("hira_embedding_B", "out rank"))
_DELORA = _layout(
    a=("delora_A", "rank in"), b=("delora_B", "out rank"), l=("delora_lambda", "1"), norm=("delora_w_norm", "in")
)
_RANDLORA = _layout(d=("randlora_lambda", "rank terms"), b=("randlora_gamma", "terms smaller"))
_GLORA = [
    _layout(
        ga=("glora_A.Xu", "rank in"),
        gb=("glora_A.Xd", "out rank"),
        a=("glora_B.Xu", "rank in"),
        b=("glora_B.Xd", "out rank"),
    ),
    _layout(g=("glora_A.X", "out 1"), h=("glora_B.X", "out 1")),
    _layout(g=("glora_A.X", "1"), h=("glora_B.X", "1")),
]
_BD_LORA = [
    _layout(a=("lora_A.weight", "(block part) in_row"), b=("lora_B.weight", "out (block part)")),
    _layout(a=("lora_A.weight", "(block part) in"), b=("lora_B.weight", "(block out_column) part")),
]
_QALORA = _layout(a=("lora_A.weight", "rank pool"), b=("lora_B.weight", "out rank"))
_KASA = _layout(a=("lora_A.weight", "triple in"), e=("lora_diag", "triple"), b=("lora_B.weight", "out triple"))
_GRALORA = _layout(
    a=("gralora_A", "in_block in_row (out_block part)"), b=("gralora_B", "out_block (in_block part) out_column")
)
_OSF = _layout(
    u=("osf_svd_params.V_low", "triple in"),
    s=("osf_svd_params.S_low", "triple"),
    v=("osf_svd_params.U_low", "out triple"),
)

_LAYERS: tuple[Kind, ...] = ("linear", "conv1d")

# For every method and kind of module the layouts that PEFT has. That with the method's own factors and axes applies.
ADAPTERS: dict[type[Method], dict[Kind, list[Layout]]] = {
    LoRA: {
        "linear": [_LORA],
        "conv1d": [_LORA],
        "conv": [_LORA],
        "embedding": [_EMBEDDING],
        "parameter": [_EXPERTS],
    },
    DoRA: {
        "linear": [{**_LORA, **_MAGNITUDE}],
        "conv1d": [{**_LORA, **_MAGNITUDE}],
        "conv": [{**_LORA, **_CONV_MAGNITUDE}],
        "embedding": [{**_EMBEDDING, **_MAGNITUDE}],
    },
    LoHa: {"linear": [_LOHA], "conv": [_LOHA]},
    LoKr: {"linear": _LOKR, "conv": _LOKR},
    VeRA: {"linear": [_VERA], "conv1d": [_VERA]},
    IA3: {"linear": _IA3, "conv1d": _IA3, "conv": _CONV_IA3},
    OFT: {"linear": [_layout(q=("oft_R.weight", "blocks angles"))]},
    BOFT: {"linear": [_layout(q=("boft_R", "levels blocks angles"), s=("boft_s", "out 1"))]},
    HRA: {"linear": [_HRA], "conv": [_HRA]},
    RoAd: {"linear": [_layout(theta=("road_theta", "(groups numbers)"), alpha=("road_alpha", "(groups numbers)"))]},
    DEFT: {"linear": [_DEFT], "conv1d": [_DEFT]},
    PaRa: {"linear": [_PARA], "conv1d": [_PARA]},
    TinyLoRA: {"linear": [_TINYLORA], "conv1d": [_TINYLORA]},
    VBLoRA: {"linear": [_VBLORA], "conv1d": [_VBLORA]},
    UniLoRA: {"linear": [_UNILORA], "conv1d": [_UNILORA]},
    SuperTuning: {"linear": [_SUPER, {**_SUPER, **_SUPRA}]},
    FRoD: {"linear": [_FROD], "conv1d": [_FROD]},
    PVeRA: {"linear": [_PVERA], "conv1d": [_PVERA]},
    MonteCLoRA: {"linear": [{**_LORA, **_SAMPLER}]},
    BDLoRA: {"linear": _BD_LORA},
    QALoRA: {"linear": [_QALORA]},
    KaSA: {"linear": [_KASA]},
    GraLoRA: {"linear": [_GRALORA], "conv1d": [_GRALORA]},
    OSF: {"linear": [_OSF]},
    C3A: {"linear": [_layout(c=("c3a_kernel", "out_blocks in_blocks block"))]},
    FourierFT: {kind: [_layout(c=("fourierft_spectrum", "n"))] for kind in _LAYERS},
    WaveFT: {kind: [_layout(c=("waveft_spectrum", "n"))] for kind in _LAYERS},
    SHiRA: {"linear": [_layout(s=("shira_weight", "entries"), place=("shira_indices", "side entries digits"))]},
    HiRA: {"linear": [_HIRA], "conv1d": [_HIRA], "conv": [_HIRA], "embedding": [_HIRA_EMBEDDING]},
    DeLoRA: {"linear": [_DELORA]},
    MiSS: {"linear": [_layout(b=("miss_block", "rank out"))]},
    RandLoRA: {"linear": [_RANDLORA], "conv1d": [_RANDLORA]},
    GLoRA: {"linear": _GLORA},
    PEANuT: {"linear": [_PEANUT, {**_PEANUT, **_PEANUT_LAYERS}]},
}
# Parameters that are trained in full.
FULL: dict[Kind, list[Layout]] = {
    "linear": [_layout(d=("weight", "out in"))],
    "conv1d": [_layout(d=("weight", "in out"))],
    "embedding": [_layout(d=("weight", "in out"))],
    "conv": [_layout(d=("weight", "out kernel"))],
    "parameter": [_layout(d=("", "out"))],
}
SUFFIXES = sorted(
    {
        factor.suffix
        for by_kind in ADAPTERS.values()
        for layouts in by_kind.values()
        for layout in layouts
        for factor in layout.values()
    }
)


def axis_groups(axes: str) -> list[list[str]]:
    """The names that each axis of a file joins: `[["rank", "in"], ["out"]]` for `"(rank in) out"`."""
    groups: list[list[str]] = []
    is_open = False
    for token in axes.replace("(", "( ").replace(")", " )").split():
        if token == "(":
            groups.append([])
        elif is_open and token != ")":
            groups[-1].append(token)
        elif token != ")":
            groups.append([token])
        is_open = token == "(" or (is_open and token != ")")
    return groups


def flat_names(axes: str) -> FlatAxes:
    """The axes of the factor in the order of the file, without axes of size 1."""
    names = [name for group in axis_groups(axes) for name in group if name not in ("1", "1...")]
    return tuple("in" if name == "kernel" else name for name in names)


def layout_of(method: Method, kind: Kind, axes: Mapping[str, FlatAxes], name: str) -> Layout:
    """The layout of a module's tensors.

    Arguments:
        method: of the module.
        kind: of the module.
        axes: of every factor that the file has for each module, by `flat_axes`.
        name: of the module, for the error.

    Raises:
        ValueError: if PEFT has none, or jlora does not know it.
    """
    by_kind = FULL if isinstance(method, Full) else ADAPTERS.get(type(method), {})
    for layout in by_kind.get(kind, ()):
        if layout.keys() == axes.keys() and all(set(flat_names(layout[f].axes)) == set(axes[f]) for f in layout):
            return layout
    raise ValueError(
        f"{type(method).__name__} of {name}, {kind}, has no form in PEFT's files that jlora knows. Convert an update "
        "of low rank by jlora.to_lora before you save it; merge one that PEFT has trained with PEFT."
    )
