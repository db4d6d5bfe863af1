"""Layers of loralib, PEFT and LyCORIS with their adapters, and formulas of papers that no library computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from lycoris.modules.locon import LoConModule  # pyright: ignore[reportMissingImports]
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
    """Normal numbers of standard deviation 0.7."""
    return torch.from_numpy(np.asarray(0.7 * rng.normal(size=shape), np.float32))


def example(kind: str, rng: np.random.RandomState) -> torch.Tensor:
    """An input of a kind of layer."""
    if kind == "embedding":
        return torch.from_numpy(rng.randint(0, N_WORDS, (2, 5)).astype(np.int32))
    if kind == "conv":
        return draw(rng, 2, N_CHANNELS, 4, 5)
    return draw(rng, 4, BASES[kind]().weight.shape[1])


def tensor(array: jax.Array) -> torch.Tensor:
    """The same array in torch."""
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
    """A layer of PEFT; `fix` replaces its random numbers by jlora's."""

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
    """If PEFT cannot compile that kernel, it warns and uses a single level."""
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
    a, b = vera.shared_matrices(SEED, N_IN, N_OUT, layer.r["default"])
    layer.vera_A["default"], layer.vera_B["default"] = tensor(a).T, tensor(b).T


def places(count: int) -> torch.Tensor:
    """Where jlora puts so many entries, as rows and columns of a torch weight, in the order of the entries."""
    rows, columns = np.divmod(np.array(_random.scattered_positions(count, SEED, N_IN * N_OUT)), N_OUT)
    return torch.from_numpy(np.stack([columns, rows]))


def fix_shira(layer: nn.Module) -> None:
    layer.shira_indices["default"] = places(len(layer.shira_weight["default"])).int()


def fix_fourierft(layer: nn.Module) -> None:
    layer.indices["default"] = places(len(layer.fourierft_spectrum["default"]))


class Formula(nn.Module):
    """What no library computes correctly: torch's own matrices in the formula of the paper.

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
