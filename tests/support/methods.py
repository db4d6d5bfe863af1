"""Every method, with hyper-parameters for tiny weights.

For each there are a few candidates, of which a weight takes the first that fits it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

import jlora
from tests.support.draw import drawn
from tests.support.weight_uses import Kind

Tree = Any

ALPHA = 3.0  # a scale that is forgotten shows


def _blocks(method: type, *sizes: Any, **options: Any) -> list[jlora.Method]:
    return [method(size, **options) for size in sizes]


# Many rows, so that those which a program reads are among them; not in order.
ROWS = [tuple(range(n))[::-1] for n in (30, 24, 16, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1)]

METHODS: dict[str, list[jlora.Method]] = {
    "lora": [jlora.LoRA(2, ALPHA)],
    "lora_of_rank_1": [jlora.LoRA(1, ALPHA)],
    "lora_offset": [jlora.LoRA(2, ALPHA, rank_stabilized=True, start="gaussian", offset=True)],
    "lora_fa": [jlora.LoRA(2, ALPHA, freeze_a=True)],
    "lora_pissa": [jlora.LoRA(2, ALPHA, start="pissa")],
    "lora_mica": [jlora.LoRA(2, ALPHA, start="mica")],
    "lora_groups": [
        jlora.GroupedLoRA(1, ALPHA, groups=3, enable=(True, False, True), group_axis=-1),
        jlora.GroupedLoRA(1, ALPHA, groups=2, enable=(False, True), group_axis=-1),
        jlora.LoRA(1, ALPHA),
    ],
    "adalora": [jlora.AdaLoRA(2, ALPHA)],
    "adamss": [jlora.AdaMSS(3, 2, 2), jlora.AdaMSS(1, 1, 1)],
    "additive": _blocks(jlora.Additive, 2, 3, 5, 1, alpha=ALPHA),
    "bd_lora": [jlora.BDLoRA(2, 2, "out", ALPHA), jlora.BDLoRA(3, 3, "out", ALPHA), jlora.LoRA(1, ALPHA)],
    "bd_lora_in": [jlora.BDLoRA(2, 2, "in", ALPHA), jlora.BDLoRA(3, 3, "in", ALPHA), jlora.LoRA(1, ALPHA)],
    "conv_lora": [jlora.ConvLoRA(1, ALPHA), jlora.LoRA(1, ALPHA)],
    "c3a": _blocks(jlora.C3A, 4, 2, 3, 5, 1),
    "deft": [jlora.DEFT(1, ALPHA)],
    "deft_qr": [jlora.DEFT(1, ALPHA, "qr")],
    "delora": [jlora.DeLoRA(2)],
    "dora": [jlora.DoRA(2, ALPHA)],
    "fourierft": [jlora.FourierFT(5)],
    "frod": [jlora.FRoD(0.2), jlora.LoRA(1, ALPHA)],
    "frod_apart": [jlora.FRoD(0.2, shared="none"), jlora.LoRA(1, ALPHA)],
    "full": [jlora.Full()],
    "glora": [jlora.GLoRA(2)],
    "glora_lora": [jlora.GLoRA(2, "lora", "vector")],
    "gralora": [jlora.GraLoRA(2, 2, ALPHA), jlora.GraLoRA(3, 3, ALPHA), jlora.LoRA(1, ALPHA)],
    "hadamard": [jlora.Hadamard(2, 2, alpha=ALPHA)],
    "hadamard_additive": [jlora.Hadamard(4, 2, "additive", ALPHA), jlora.Hadamard(2, 2, "additive", ALPHA)],
    "hadamard_tanh": [jlora.Hadamard(4, 2, "tanh", ALPHA)],
    "hadamard_sigmoid": [jlora.Hadamard(4, 2, "sigmoid", ALPHA)],
    "hira": [jlora.HiRA(2, ALPHA)],
    "hra": [jlora.HRA(2)],
    "ia3": [jlora.IA3()],
    "ia3_in": [jlora.IA3("in")],
    "kasa": [jlora.KaSA(2, ALPHA), jlora.KaSA(1, ALPHA), jlora.LoRA(1, ALPHA)],
    "locon": [jlora.LoCon(2, ALPHA), jlora.LoCon(1, ALPHA)],
    "loha": [jlora.LoHa(2, ALPHA)],
    "lokr": [jlora.LoKr(1, ALPHA)],
    "lokr_both": [jlora.LoKr(1, ALPHA, decompose_both=True)],
    "lora_xs": [jlora.LoRAXS(2, ALPHA)],
    "miss": _blocks(jlora.MiSS, 2, 3, 5, 1),
    "monteclora": [jlora.MonteCLoRA(2, ALPHA, samples=3)],
    "oft": _blocks(jlora.OFT, 2, 3, 5, 7, 11),
    "osf": [jlora.OSF(2), jlora.OSF(1), jlora.LoRA(1, ALPHA)],
    "psoft": [jlora.PSOFT(2)],
    "qalora": [*_blocks(jlora.QALoRA, 2, 1, group=2, alpha=ALPHA), jlora.QALoRA(1, 3, ALPHA), jlora.LoRA(1, ALPHA)],
    "oft_shared": _blocks(jlora.OFT, 2, 3, 5, 7, 11, shared=True, neumann_terms=5),
    "boft": [*_blocks(jlora.BOFT, 2, 6, levels=2), *_blocks(jlora.BOFT, 2, 3, 5, 7, 11, levels=1)],
    "peanut": [jlora.PEANuT(2, scaling=0.5)],
    "peanut_deep": [jlora.PEANuT(2, 2, "tanh", 0.5)],
    "pvera": [jlora.PVeRA(3)],
    "randlora": [jlora.RandLoRA(2, ALPHA)],
    "randlora_shared": [jlora.RandLoRA(2, ALPHA, matrices=(256, 64))],
    "rows": _blocks(jlora.Rows, *ROWS),
    "rows_out": _blocks(jlora.Rows, *ROWS, axis="out"),
    "para": [jlora.PaRa(1)],
    # A sum of squares, which some tests differentiate, does not see a rotation by one angle: two angles.
    "road": [*(jlora.RoAd(2, group) for group in (4, 6, 2)), jlora.LoRA(1)],
    "road_4": [*(jlora.RoAd(4, group) for group in (6, 4, 2)), jlora.LoRA(1)],
    "shared_a": [jlora.SharedLoRA(2, ALPHA)],
    "shared_b": [jlora.SharedLoRA(2, ALPHA, shared="b")],
    "shira": [jlora.SHiRA(1), jlora.FourierFT(2)],
    "super_tuning": [jlora.SuperTuning(0.2)],
    "supra": [jlora.SuperTuning(0.7, False, 2, ALPHA), jlora.SuperTuning(0.7, False, 1, ALPHA)],
    "tinylora": [jlora.TinyLoRA(2, 3)],
    "tinylora_untied": [jlora.TinyLoRA(2, 3, tied=False)],
    "unilora": [jlora.UniLoRA(2, 7)],
    "vblora": [jlora.VBLoRA(2, 5, 3)],
    "vera": [jlora.VeRA(3)],
    "waveft": [jlora.WaveFT(5), jlora.WaveFT(2)],
}


def some(label: str, *always: str) -> list[Any]:
    """Every method as a case: those named `always` and a tenth of the others, drawn daily, and nightly the rest."""
    return [
        pytest.param(name, marks=[] if name in always or drawn(label, name, one_in=10) else [pytest.mark.nightly])
        for name in METHODS
    ]


def fitting(name: str, site: jlora.Site) -> jlora.Method:
    """The first candidate that fits a site."""
    return next(method for method in METHODS[name] if not method.unsupported_reason(site))


def shapes_of_adapter(kind: Kind, fun: Callable[..., Any], params: Tree, x: Tree, method: str = "lora") -> Tree:
    """The shapes of an adapter for every weight of a kind."""
    sites = jlora.trace(fun, params, x)
    targets = {path: fitting(method, sites[path]) for path in kind.weights}
    return jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, targets, params=params))
