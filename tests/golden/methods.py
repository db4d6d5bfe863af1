"""Records `methods.npz`: adapted layers of loralib, PEFT and LyCORIS with fixed weights, their outputs and gradients.

The file holds a weight and an input for each kind of layer, and for each reference its adapter's tensors by the
library's own names, the output, the gradients of sum(sin(output)) with respect to those tensors, and the weight with
the adapter folded in.

    pip install ".[references]"
    PYTHONPATH=. python -m tests.golden.methods
"""

from __future__ import annotations

import zlib
from pathlib import Path

import loralib  # pyright: ignore[reportMissingImports]
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from lycoris.modules.loha import LohaModule  # pyright: ignore[reportMissingImports]
from lycoris.modules.lokr import LokrModule  # pyright: ignore[reportMissingImports]

from tests.golden.reference_layers import (
    ALPHA,
    BASES,
    KERNEL,
    N_CHANNELS,
    N_IN,
    N_OUT,
    N_WORDS,
    Wrap,
    additive,
    draw,
    example,
    fix_fourierft,
    fix_randlora,
    fix_shira,
    fix_vera,
    of_boft,
    of_formula,
    of_locon,
    of_loralib,
    of_lycoris,
    of_peft,
    of_randlora,
)

LORA = {"r": 4, "lora_alpha": ALPHA}


ADALORA = {"init_r": 4, "target_r": 2, "total_step": 9, "tfinal": 1, "lora_alpha": ALPHA}


REFERENCES: dict[str, tuple[str, Wrap]] = {
    "loralib_linear": ("linear", of_loralib(loralib.Linear, N_IN, N_OUT, r=4, bias=False)),
    "loralib_merged_linear": (
        "linear",
        of_loralib(loralib.MergedLinear, N_IN, N_OUT, r=2, enable_lora=[True, False, True], bias=False),
    ),
    "loralib_embedding": ("embedding", of_loralib(loralib.Embedding, N_WORDS, N_OUT, r=4)),
    "loralib_conv2d": ("conv", of_loralib(loralib.Conv2d, N_CHANNELS, N_OUT, KERNEL, r=2, bias=False)),
    "peft_lora": ("linear", of_peft(peft.LoraConfig, **LORA)),
    "peft_lora_stabilized": ("linear", of_peft(peft.LoraConfig, use_rslora=True, **LORA)),
    "peft_lora_embedding": ("embedding", of_peft(peft.LoraConfig, **LORA)),
    "peft_lora_conv2d": ("conv", of_peft(peft.LoraConfig, **LORA)),
    "peft_dora": ("linear", of_peft(peft.LoraConfig, use_dora=True, **LORA)),
    "peft_dora_embedding": ("embedding", of_peft(peft.LoraConfig, use_dora=True, **LORA)),
    "peft_dora_conv2d": ("conv", of_peft(peft.LoraConfig, use_dora=True, **LORA)),
    "peft_adalora": ("linear", of_peft(peft.AdaLoraConfig, **ADALORA)),
    "peft_adalora_conv2d": ("conv", of_peft(peft.AdaLoraConfig, **ADALORA)),
    "peft_loha": ("linear", of_peft(peft.LoHaConfig, r=2, alpha=ALPHA)),
    "peft_loha_dense": ("linear", of_peft(peft.LoHaConfig, r=3, alpha=ALPHA)),
    "peft_loha_conv2d": ("conv", of_peft(peft.LoHaConfig, r=2, alpha=ALPHA)),
    # PEFT multiplies by alpha / rank where both factors are whole too, LyCORIS and jlora do not: alpha is the rank.
    "peft_lokr_whole": ("linear", of_peft(peft.LoKrConfig, r=3, alpha=3)),
    "peft_lokr": ("linear", of_peft(peft.LoKrConfig, r=2, alpha=ALPHA)),
    "peft_lokr_both": ("linear", of_peft(peft.LoKrConfig, r=1, alpha=ALPHA, decompose_both=True)),
    "peft_lokr_whole_conv2d": ("conv", of_peft(peft.LoKrConfig, r=3, alpha=3)),
    "peft_lokr_conv2d": ("conv", of_peft(peft.LoKrConfig, r=1, alpha=ALPHA)),
    "peft_vera": ("linear", of_peft(peft.VeraConfig, fix_vera, r=5)),
    "peft_ia3": ("linear", of_peft(peft.IA3Config, feedforward_modules=[])),
    "peft_ia3_feedforward": ("linear", of_peft(peft.IA3Config, feedforward_modules=["layer"])),
    "peft_ia3_conv2d": ("conv", of_peft(peft.IA3Config, feedforward_modules=[])),
    "peft_ia3_conv2d_feedforward": ("conv", of_peft(peft.IA3Config, feedforward_modules=["layer"])),
    "peft_oft": ("linear", of_peft(peft.OFTConfig, r=0, oft_block_size=4, use_cayley_neumann=False)),
    "peft_boft": ("linear", of_boft(2, 2)),
    "peft_boft_of_one_level": ("linear", of_boft(3, 1)),
    "peft_boft_of_three_levels": ("linear_of_16", of_boft(2, 3)),
    "peft_hra": ("linear", of_peft(peft.HRAConfig, r=4, apply_GS=False)),
    "peft_hra_conv2d": ("conv", of_peft(peft.HRAConfig, r=4, apply_GS=False)),
    "peft_hira": ("linear", of_peft(peft.HiraConfig, r=4)),
    "peft_hira_embedding": ("embedding", of_peft(peft.HiraConfig, r=4)),
    "peft_hira_conv2d": ("conv", of_peft(peft.HiraConfig, r=4)),
    "peft_fourierft": ("linear", of_peft(peft.FourierFTConfig, fix_fourierft, n_frequency=20, scaling=40.0)),
    "peft_randlora_of_one_term": ("linear", of_peft(peft.RandLoraConfig, fix_randlora, r=N_IN, randlora_alpha=ALPHA)),
    "randlora": ("linear", of_randlora),
    "peft_miss": ("linear", of_peft(peft.MissConfig, r=4)),
    "peft_delora": ("linear", of_peft(peft.DeloraConfig, r=4)),
    "peft_shira": ("linear", of_peft(peft.ShiraConfig, fix_shira, r=2)),
    "additive": ("linear", of_formula(3, 1, additive)),
    "additive_embedding": ("embedding", of_formula(1, 1, additive)),
    "hadamard": ("linear", of_formula(2, 3, lambda a, b: b @ a)),
    "hadamard_additive": ("linear", of_formula(3, 2, additive)),
    "hadamard_tanh": ("linear", of_formula(2, 2, lambda a, b: torch.tanh(b @ a))),
    "lycoris_locon": ("linear", of_locon),
    "lycoris_locon_conv2d": ("conv", of_locon),
    "lycoris_loha": ("linear", of_lycoris(LohaModule, lora_dim=2)),
    "lycoris_lokr_whole": ("linear", of_lycoris(LokrModule, lora_dim=4)),
    "lycoris_lokr": ("linear", of_lycoris(LokrModule, lora_dim=2)),
    "lycoris_lokr_whole_conv2d": ("conv", of_lycoris(LokrModule, lora_dim=4)),
    "lycoris_lokr_conv2d": ("conv", of_lycoris(LokrModule, lora_dim=1)),
    "lycoris_lokr_both": ("linear", of_lycoris(LokrModule, lora_dim=1, decompose_both=True)),
}


def short(name: str) -> str:
    """A parameter's name without those of the adapter and of the array."""
    return ".".join(part for part in name.split(".") if part not in ("default", "weight"))


def given(kind: str) -> dict[str, np.ndarray]:
    """The weight and the input of a kind of layer."""
    rng = np.random.RandomState(zlib.crc32(kind.encode()))
    weight = draw(rng, *BASES[kind]().weight.shape)
    return {"weight": weight.numpy(), "x": example(kind, rng).numpy()}


def record(name: str) -> dict[str, np.ndarray]:
    """What one reference makes of its weight and its input."""
    kind, wrap = REFERENCES[name]
    start = given(kind)
    base = BASES[kind]()
    base.weight.data = torch.from_numpy(start["weight"])
    adapted = wrap(base)
    trained = {short(key): p for key, p in adapted.layer.named_parameters() if p.requires_grad}
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    for key in sorted(trained):
        trained[key].data = draw(rng, *trained[key].shape)
    y = adapted.layer(torch.from_numpy(start["x"]))
    torch.sin(y).sum().backward()
    out = {"y": y, "merged": adapted.merged()}
    for key, parameter in trained.items():
        out |= {f"factor.{key}": parameter, f"gradient.{key}": parameter.grad}
    return {key: value.detach().numpy() for key, value in out.items()}


def records() -> dict[str, np.ndarray]:
    """Everything, by `kind/array` and `reference/array`."""
    parts = {kind: given(kind) for kind in BASES} | {name: record(name) for name in REFERENCES}
    return {f"{part}/{key}": array for part, arrays in parts.items() for key, array in arrays.items()}


def main() -> None:
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **records())
    print(path, path.stat().st_size, "bytes,", len(REFERENCES), "references")


if __name__ == "__main__":
    main()
