"""Makes `methods.npz`: adapted layers of loralib, PEFT and LyCORIS with fixed weights, their outputs and gradients.

The file holds a weight and an input for each kind of layer, and for each reference its adapter's tensors by the
library's own names, the output, the gradients of sum(sin(output)) with respect to those tensors, and the weight with
the adapter folded in.

    pip install ".[references]"
    python tests/golden/methods.py
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import loralib  # pyright: ignore[reportMissingImports]
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from lycoris.modules.locon import LoConModule  # pyright: ignore[reportMissingImports]
from lycoris.modules.loha import LohaModule  # pyright: ignore[reportMissingImports]
from lycoris.modules.lokr import LokrModule  # pyright: ignore[reportMissingImports]
from peft.tuners.boft import layer as boft  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from jlora.methods import vera
from jlora.methods._common import random_matrices as _random

N_IN, N_OUT, N_WORDS, N_CHANNELS, KERNEL = 12, 15, 14, 4, 2
ALPHA = 3
SEED = 5


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A layer with its adapter, and how to fold the adapter in."""

    layer: nn.Module
    merged: Callable[[], torch.Tensor]


Wrap = Callable[[nn.Module], Adapted]

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N_IN, N_OUT, bias=False),
    "linear_of_16": lambda: nn.Linear(16, N_OUT, bias=False),
    "embedding": lambda: nn.Embedding(N_WORDS, N_OUT),
    "conv": lambda: nn.Conv2d(N_CHANNELS, N_OUT, KERNEL, bias=False),
}


def draw(rng: np.random.RandomState, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(0.7 * rng.normal(size=shape), np.float32))


def example(kind: str, rng: np.random.RandomState) -> torch.Tensor:
    if kind == "embedding":
        return torch.from_numpy(rng.randint(0, N_WORDS, (2, 5)).astype(np.int32))
    if kind == "conv":
        return draw(rng, 2, N_CHANNELS, 4, 5)
    return draw(rng, 4, BASES[kind]().weight.shape[1])


def tensor(array: jax.Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def of_loralib(layer: type[nn.Module], *sizes: int, **options: Any) -> Wrap:
    def wrap(base: nn.Module) -> Adapted:
        own = layer(*sizes, lora_alpha=ALPHA, **options)
        holder = own.conv if hasattr(own, "conv") else own
        holder.weight.data = base.weight.data.clone()

        def merged() -> torch.Tensor:
            own.eval()
            return holder.weight

        return Adapted(own, merged)

    return wrap


def of_peft(config: type[peft.PeftConfig], fix: Callable[[nn.Module], None] | None = None, **options: Any) -> Wrap:
    """A layer of PEFT; `fix` puts jlora's random numbers in place of its own."""

    def wrap(base: nn.Module) -> Adapted:
        model = nn.ModuleDict({"layer": base})
        layer = peft.get_peft_model(model, config(target_modules=["layer"], **options)).base_model.model["layer"]
        if fix:
            fix(layer)

        def merged() -> torch.Tensor:
            layer.merge()
            return layer.get_base_layer().weight

        return Adapted(layer, merged)

    return wrap


class BlockDiagonal:
    """What PEFT's kernel for GPUs computes: each level's blocks along the diagonal of a matrix."""

    @staticmethod
    def apply(blocks: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.block_diag(*level) for level in blocks])


def of_boft(block: int, levels: int) -> Wrap:
    """Where PEFT cannot compile that kernel, it leaves a single level without a word but a warning."""
    wrap = of_peft(peft.BOFTConfig, boft_block_size=block, boft_n_butterfly_factor=levels)

    def with_levels(base: nn.Module) -> Adapted:
        boft.get_fbd_cuda, boft.FastBlockDiag = lambda: True, BlockDiagonal
        return wrap(base)

    return with_levels


def of_lycoris(module: type[nn.Module], **options: Any) -> Wrap:
    """A layer of LyCORIS.

    Its `get_merged_weight` multiplies by alpha / rank twice, once in `get_weight` and once more in `get_diff_weight`;
    its forward pass does so once. So the folded weight is the base plus `get_weight`.
    """

    def wrap(base: nn.Module) -> Adapted:
        layer = module("layer", base.requires_grad_(False), alpha=ALPHA, **options)
        return Adapted(layer, lambda: base.weight + layer.get_weight(base.weight.shape))

    return wrap


def of_locon(base: nn.Module) -> Adapted:
    layer = LoConModule("layer", base.requires_grad_(False), lora_dim=2, alpha=ALPHA, use_tucker=True)
    return Adapted(layer, lambda: layer.get_merged_weight()[0])


class RandLoRA(nn.Module):
    """The sum over k of A_k diag(lambda_k) B_k diag(gamma_k), as RandLoRA's paper writes it.

    PEFT takes one matrix B for all k, and lays out the columns of A by k and then rank, but the rows of B by rank and
    then k: entries of one term multiply rows of another. With a single term it is the same.
    """

    def __init__(self, base: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.count = rank, -(-N_IN // rank)
        self.gamma = nn.Parameter(torch.empty(self.count, N_IN))
        self.lambda_ = nn.Parameter(torch.empty(self.count, rank))
        self.large, self.small = randlora_matrices(self.count * rank)

    def merged(self) -> torch.Tensor:
        delta = torch.zeros(N_OUT, N_IN)
        for k in range(self.count):
            rows = slice(k * self.rank, (k + 1) * self.rank)
            scaled = self.large[:, rows] @ torch.diag(self.lambda_[k])
            delta = delta + scaled @ self.small[rows] @ torch.diag(self.gamma[k])
        return self.base.weight + ALPHA / self.rank * delta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.merged())


def of_randlora(base: nn.Module) -> Adapted:
    layer = RandLoRA(base, 5)
    return Adapted(layer, layer.merged)


def randlora_matrices(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of the larger (out) and of the smaller (in) side."""
    large, small = _random.keys(SEED, 2)
    return tensor(_random.rows(large, N_OUT, columns)), tensor(_random.rows(small, columns, N_IN))


def fix_randlora(layer: nn.Module) -> None:
    large, small = randlora_matrices(N_IN)
    layer.randlora_A["default"], layer.randlora_B["default"] = small[:, None, :], large[:, None, :]


def fix_vera(layer: nn.Module) -> None:
    a, b = vera.shared(SEED, N_IN, N_OUT, layer.r["default"])
    layer.vera_A["default"], layer.vera_B["default"] = tensor(a).T, tensor(b).T


def places(count: int) -> torch.Tensor:
    """Where jlora puts so many entries, as rows and columns of a torch weight, in the order of the entries."""
    numbers = np.array(_random.scattered(jnp.arange(1, count + 1), SEED, N_IN, N_OUT))
    rows, columns = np.nonzero(numbers)
    order = np.argsort(numbers[rows, columns])
    return torch.from_numpy(np.stack([columns[order], rows[order]]))


def fix_shira(layer: nn.Module) -> None:
    layer.shira_indices["default"] = places(len(layer.shira_weight["default"])).int()


def fix_fourierft(layer: nn.Module) -> None:
    layer.indices["default"] = places(len(layer.fourierft_spectrum["default"]))


class Formula(nn.Module):
    """What no library at hand computes (or none rightly): torch's own matrices in the formula of the paper.

    The library that introduced the additive update forgets its scale where it merges an embedding.
    """

    def __init__(self, base: nn.Module, rank: int, terms: int, term: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.base, self.term, self.scale = base.requires_grad_(False), term, ALPHA / (rank * terms)
        out, inner = base.weight.shape if isinstance(base, nn.Linear) else base.weight.T.shape
        self.a = nn.ParameterList(torch.empty(rank, inner) for _ in range(terms))
        self.b = nn.ParameterList(torch.empty(out, rank) for _ in range(terms))

    def merged(self) -> torch.Tensor:
        update = self.scale * torch.stack([self.term(a, b) for a, b in zip(self.a, self.b, strict=True)]).prod(0)
        return self.base.weight + (update if isinstance(self.base, nn.Linear) else update.T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        call = nn.functional.linear if isinstance(self.base, nn.Linear) else nn.functional.embedding
        return call(x, self.merged())


def additive(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.repeat(len(b) // len(a), 1) + b.repeat(1, a.shape[1] // len(a))


def of_formula(rank: int, terms: int, term: Callable[[Any, Any], torch.Tensor]) -> Wrap:
    def wrap(base: nn.Module) -> Adapted:
        layer = Formula(base, rank, terms, term)
        return Adapted(layer, layer.merged)

    return wrap


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
