"""Records `combine.npz`: layers with three adapters of PEFT, and what its `add_weighted_adapter` makes of them.

The file holds for each kind of layer the tensors of the adapters by PEFT's names, and for each rule the combined change
of the weight. PEFT draws what "dare" drops; here it gets what jlora drops, which the file holds too.

    pip install ".[references]"
    PYTHONPATH=. python -m tests.golden.combine
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from tests.golden.reference_layers import draw
from tests.support.combinations import CONFIGS, KINDS, RULES, drop_masks

NAMES = tuple(CONFIGS)


def layers() -> nn.ModuleDict:
    """One layer of every kind."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(*reversed(KINDS["linear"]), bias=False),
            "square": nn.Linear(*KINDS["square"], bias=False),
            "embedding": nn.Embedding(*KINDS["embedding"]),
            "conv": nn.Conv2d(*KINDS["conv"][1::-1], KINDS["conv"][2:], bias=False),
        }
    )


def adapted() -> Any:
    """The layers with the three adapters, all of their numbers at random."""
    configs = {
        name: peft.LoraConfig(target_modules=list(KINDS), r=rank, lora_alpha=alpha, use_rslora=is_stabilised)
        for name, (rank, alpha, is_stabilised) in CONFIGS.items()
    }
    model = peft.get_peft_model(layers(), configs[NAMES[0]], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, configs[name])
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = draw(np.random.RandomState(zlib.crc32(key.encode())), *parameter.shape)
    return model


def combined(model: Any, rule: str) -> dict[str, np.ndarray]:
    """The combined change of every layer by a rule."""
    name, weights, options = RULES[rule]
    masks = [torch.from_numpy(mask) for kind in KINDS for mask in drop_masks(kind)]
    with mock.patch.object(torch, "bernoulli", side_effect=masks), torch.no_grad():
        model.base_model.add_weighted_adapter(list(NAMES), weights, rule, combination_type=name, **options)
    return {kind: model.base_model.model[kind].get_delta_weight(rule).detach().numpy() for kind in KINDS}


def records() -> dict[str, np.ndarray]:
    """Everything, by `kind/adapter/tensor`, `kind/rule` and `kind/dropped`."""
    model = adapted()
    out = {f"{kind}/{rule}": a for rule in RULES for kind, a in combined(model, rule).items()}
    for key, parameter in model.named_parameters():
        _, _, kind, tensor, adapter, *_ = key.split(".")
        if "lora_" in tensor and adapter in NAMES:
            out[f"{kind}/{adapter}/{tensor}"] = parameter.detach().numpy()
    return out | {f"{kind}/dropped": drop_masks(kind) for kind in KINDS}


def main() -> None:
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **records())
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
