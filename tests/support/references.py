"""The cases of `golden/methods.py`: every reference method of another library as a method of jlora's.

A reference's tensors become jlora's factors by a function, so gradients are compared in the reference's own layout.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora

GOLDEN = Path(__file__).parents[1] / "golden" / "methods.npz"
BOUND = 1e-5  # of the largest entry, in float32

Array = jax.Array
Factors = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Program:
    """A layer in JAX: its kind, what it computes, and the order in which it holds the axes of torch's weight."""

    kind: str
    use: Callable[[dict[str, Array], Array], Array]
    order: tuple[int, ...]


LINEAR = Program("linear", lambda params, x: x @ params["w"], (1, 0))
LINEAR_OF_16 = dataclasses.replace(LINEAR, kind="linear_of_16")
EMBEDDING = Program("embedding", lambda params, ids: params["w"][ids], (0, 1))
CONV = Program(
    "conv",
    lambda params, x: lax.conv_general_dilated(
        x, params["w"], (1, 1), "VALID", dimension_numbers=("NCHW", "HWIO", "NCHW")
    ),
    (2, 3, 1, 0),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference in terms of jlora.

    Arguments:
        method: the method with the reference's hyper-parameters.
        factors: jlora's factors from the reference's tensors, and from the weight as the program holds it.
        program: the layer.
    """

    method: jlora.Method
    factors: Callable[[Factors, Array], Factors]
    program: Program = LINEAR


def renamed(**names: str) -> Callable[[Factors, Array], Factors]:
    """Factors that are the reference's tensors by other names, transposed where the name ends with `.T`."""

    def factors(ref: Factors, w: Array) -> Factors:
        return {name: ref[own.removesuffix(".T")].T if own.endswith(".T") else ref[own] for name, own in names.items()}

    return factors


def conv(a: str, b: str) -> Callable[[Factors, Array], Factors]:
    """A whose rows run over in channels and kernel, whatever its shape, and B whose kernel, if any, is of size 1."""

    def factors(ref: Factors, w: Array) -> Factors:
        return {"a": conv_rows(ref[a].reshape(ref[a].shape[0], -1).T, w), "b": ref[b].reshape(w.shape[-1], -1).T}

    return factors


def conv_rows(matrix: Array, w: Array) -> Array:
    """A matrix over (in, height, width) as one over (height, width, in)."""
    height, width, n_in, _ = w.shape
    return matrix.reshape(n_in, height, width, -1).transpose(1, 2, 0, 3)


def loha_conv(ref: Factors, w: Array) -> Factors:
    flat = LOHA(ref, w)
    return flat | {name: conv_rows(flat[name], w) for name in ("a0", "a1")}


def lokr_conv(ref: Factors, w: Array) -> Factors:
    """The smaller kernel, whole or as a product, is one of the larger channels' parts."""
    height, width, *_ = w.shape
    if "lokr_w2" in ref:
        return {"c": ref["lokr_w1"].T, "d": ref["lokr_w2"].transpose(2, 3, 1, 0)}
    a = ref["lokr_w2_b"].reshape(len(ref["lokr_w2_b"]), -1, height, width)
    return {"c": ref["lokr_w1"].T, "a": a.transpose(2, 3, 1, 0), "b": ref["lokr_w2_a"].T}


def gained(factors: Callable[[Factors, Array], Factors]) -> Callable[[Factors, Array], Factors]:
    """DoRA: PEFT trains the magnitude, jlora what it has gained since the start."""

    def with_magnitude(ref: Factors, w: Array) -> Factors:
        norm = jnp.sqrt(jnp.square(w).sum(tuple(range(w.ndim - 1))))
        return factors(ref, w) | {"m": ref["lora_magnitude_vector"].reshape(-1) - norm}

    return with_magnitude


def merged_linear(ref: Factors, w: Array) -> Factors:
    """Two of three groups, of rank 2 each."""
    return {
        "a": ref["lora_A"].reshape(2, 2, w.shape[0]).transpose(2, 0, 1),
        "b": ref["lora_B"].reshape(2, w.shape[1] // 3, 2).transpose(0, 2, 1),
    }


def boft(ref: Factors, w: Array) -> Factors:
    """PEFT trains whole matrices, of which the antisymmetric part counts."""
    rows, columns = jnp.triu_indices(ref["boft_R"].shape[-1], 1)
    q = 0.5 * (ref["boft_R"] - ref["boft_R"].mT)
    return {"q": q[..., rows, columns], "s": ref["boft_s"][:, 0]}


def locon(ref: Factors, w: Array) -> Factors:
    return {
        "a": ref["lora_down"].reshape(2, -1).T,
        "core": ref["lora_mid"].transpose(2, 3, 1, 0),
        "b": ref["lora_up"].reshape(-1, 2).T,
    }


def terms(count: int) -> Callable[[Factors, Array], Factors]:
    """Factors of a product of several terms."""
    return renamed(**{f"{name}{k}": f"{name}.{k}.T" for name in "ab" for k in range(count)})


LORA = renamed(a="lora_A.T", b="lora_B.T")
EMBEDDED = renamed(a="lora_embedding_A.T", b="lora_embedding_B.T")
LORA_CONV = conv("lora_A", "lora_B")
LOHA = renamed(a0="hada_w1_b.T", b0="hada_w1_a.T", a1="hada_w2_b.T", b1="hada_w2_a.T")
LOKR_WHOLE = renamed(c="lokr_w1.T", d="lokr_w2.T")
LOKR = renamed(c="lokr_w1.T", a="lokr_w2_b.T", b="lokr_w2_a.T")
LOKR_BOTH = renamed(ca="lokr_w1_b.T", cb="lokr_w1_a.T", a="lokr_w2_b.T", b="lokr_w2_a.T")
ALPHA, SEED = 3.0, 5
ADALORA = jlora.AdaLoRA(4, ALPHA * 4 / (4 + 1e-5))  # PEFT divides by the rank plus 1e-5

CASES = {
    "loralib_linear": Case(jlora.LoRA(4, ALPHA), LORA),
    "loralib_merged_linear": Case(jlora.GroupedLoRA(2, ALPHA, groups=3, enable=(True, False, True)), merged_linear),
    "loralib_embedding": Case(jlora.LoRA(4, ALPHA), LORA, EMBEDDING),
    "loralib_conv2d": Case(jlora.ConvLoRA(2, ALPHA), LORA, CONV),
    "peft_lora": Case(jlora.LoRA(4, ALPHA), LORA),
    "peft_lora_stabilized": Case(jlora.LoRA(4, ALPHA, rank_stabilized=True), LORA),
    "peft_lora_embedding": Case(jlora.LoRA(4, ALPHA), EMBEDDED, EMBEDDING),
    "peft_lora_conv2d": Case(jlora.LoRA(4, ALPHA), LORA_CONV, CONV),
    "peft_dora": Case(jlora.DoRA(4, ALPHA), gained(LORA)),
    "peft_dora_embedding": Case(jlora.DoRA(4, ALPHA), gained(EMBEDDED), EMBEDDING),
    "peft_dora_conv2d": Case(jlora.DoRA(4, ALPHA), gained(LORA_CONV), CONV),
    "peft_adalora": Case(
        ADALORA, lambda ref, w: {"p": ref["lora_A"].T, "e": ref["lora_E"][:, 0], "q": ref["lora_B"].T}
    ),
    "peft_adalora_conv2d": Case(
        ADALORA,
        lambda ref, w: {"p": conv_rows(ref["lora_A"].T, w), "e": ref["lora_E"][:, 0], "q": ref["lora_B"].T},
        CONV,
    ),
    "peft_loha": Case(jlora.LoHa(2, ALPHA), LOHA),
    "peft_loha_dense": Case(jlora.LoHa(3, ALPHA), LOHA),
    "peft_loha_conv2d": Case(jlora.LoHa(2, ALPHA), loha_conv, CONV),
    "peft_lokr_whole": Case(jlora.LoKr(3, ALPHA), LOKR_WHOLE),
    "peft_lokr": Case(jlora.LoKr(2, ALPHA), LOKR),
    "peft_lokr_both": Case(jlora.LoKr(1, ALPHA, decompose_both=True), LOKR_BOTH),
    "peft_lokr_whole_conv2d": Case(jlora.LoKr(3, ALPHA), lokr_conv, CONV),
    "peft_lokr_conv2d": Case(jlora.LoKr(1, ALPHA), lokr_conv, CONV),
    "peft_vera": Case(jlora.VeRA(5, seed=SEED), renamed(d="vera_lambda_d", b="vera_lambda_b")),
    "peft_ia3": Case(jlora.IA3(), lambda ref, w: {"l": ref["ia3_l"][:, 0]}),
    "peft_ia3_feedforward": Case(jlora.IA3("in"), lambda ref, w: {"l": ref["ia3_l"][0]}),
    "peft_ia3_conv2d": Case(jlora.IA3(), lambda ref, w: {"l": ref["ia3_l"].reshape(-1)}, CONV),
    "peft_ia3_conv2d_feedforward": Case(jlora.IA3("in"), lambda ref, w: {"l": ref["ia3_l"].reshape(-1)}, CONV),
    "peft_oft": Case(jlora.OFT(4), renamed(q="oft_R")),
    "peft_boft": Case(jlora.BOFT(2, 2), boft),
    "peft_boft_of_one_level": Case(jlora.BOFT(3, 1), boft),
    "peft_boft_of_three_levels": Case(jlora.BOFT(2, 3), boft, LINEAR_OF_16),
    "peft_hra": Case(jlora.HRA(4), renamed(u="hra_u")),
    "peft_hra_conv2d": Case(jlora.HRA(4), lambda ref, w: {"u": conv_rows(ref["hra_u"], w)}, CONV),
    "peft_hira": Case(jlora.HiRA(4), renamed(a="hira_A.T", b="hira_B.T")),
    "peft_hira_embedding": Case(jlora.HiRA(4), renamed(a="hira_embedding_A.T", b="hira_embedding_B.T"), EMBEDDING),
    "peft_hira_conv2d": Case(jlora.HiRA(4), conv("hira_A", "hira_B"), CONV),
    "peft_fourierft": Case(jlora.FourierFT(20, 40.0, SEED), renamed(c="fourierft_spectrum")),
    "peft_randlora_of_one_term": Case(
        jlora.RandLoRA(12, ALPHA, SEED), renamed(d="randlora_lambda.T", b="randlora_gamma")
    ),
    "randlora": Case(jlora.RandLoRA(5, ALPHA, SEED), renamed(d="lambda_", b="gamma")),
    "peft_miss": Case(jlora.MiSS(4), renamed(b="miss_block")),
    "peft_delora": Case(
        jlora.DeLoRA(4),
        lambda ref, w: {"a": ref["delora_A"].T, "b": ref["delora_B"].T, "l": ref["delora_lambda"][0]},
    ),
    "peft_shira": Case(jlora.SHiRA(2, SEED), renamed(s="shira_weight")),
    "additive": Case(jlora.Additive(3, ALPHA), renamed(a="a.0.T", b="b.0.T")),
    "additive_embedding": Case(jlora.Additive(1, ALPHA), renamed(a="a.0.T", b="b.0.T"), EMBEDDING),
    "hadamard": Case(jlora.Hadamard(6, 3, alpha=ALPHA), terms(3)),
    "hadamard_additive": Case(jlora.Hadamard(6, 2, "additive", ALPHA), terms(2)),
    "hadamard_tanh": Case(jlora.Hadamard(4, 2, "tanh", ALPHA), terms(2)),
    "lycoris_locon": Case(jlora.LoCon(2, ALPHA), renamed(a="lora_down.T", b="lora_up.T")),
    "lycoris_locon_conv2d": Case(jlora.LoCon(2, ALPHA), locon, CONV),
    "lycoris_loha": Case(jlora.LoHa(2, ALPHA), LOHA),
    "lycoris_lokr_whole": Case(jlora.LoKr(4, ALPHA), LOKR_WHOLE),
    "lycoris_lokr": Case(jlora.LoKr(2, ALPHA), LOKR),
    "lycoris_lokr_whole_conv2d": Case(jlora.LoKr(4, ALPHA), lokr_conv, CONV),
    "lycoris_lokr_conv2d": Case(jlora.LoKr(1, ALPHA), lokr_conv, CONV),
    "lycoris_lokr_both": Case(jlora.LoKr(1, ALPHA, decompose_both=True), LOKR_BOTH),
}


@functools.cache
def golden() -> dict[str, dict[str, np.ndarray]]:
    """The file's arrays, by kind of layer or reference, and by name."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN) as file:
        for key in file:
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = file[key]
    return parts


def error(got: Any, want: np.ndarray) -> float:
    """The largest difference in units of the largest entry; infinite where the shapes differ."""
    if got.shape != want.shape:
        return np.inf
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


def off(got: Mapping[str, Any], want: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The errors that are too large; both hold the same."""
    assert set(got) == set(want)
    errors = {name: error(array, want[name]) for name, array in got.items()}
    return {name: value for name, value in errors.items() if not value <= BOUND}
