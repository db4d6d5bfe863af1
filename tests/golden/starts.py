"""Records `starts.npz`: the starts of PEFT that depend on data, of a small model of linear layers.

The file holds for each layer EVA's components, CorDA's change of the weight in both modes, and LoRA-GA's factors, in
torch's layout.

    pip install ".[references]"
    PYTHONPATH=. python -m tests.golden.starts
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from peft.tuners.lora import corda, eva, loraga  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from tests.support.data_starts import ALPHA, RANK, RHO, SIZES, draw


class Model(nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        for name, (n_in, n_out) in SIZES.items():
            layer = nn.Linear(n_in, n_out, bias=False)
            layer.weight.data = torch.from_numpy(draw(name).T.copy())
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.mix(torch.tanh(self.up(x)))))


def config(start: str, **options: Any) -> Any:
    return peft.LoraConfig(
        target_modules=list(SIZES), r=RANK, lora_alpha=ALPHA, init_lora_weights=start, bias="none", **options
    )


def eva_components() -> dict[str, np.ndarray]:
    x = torch.from_numpy(draw("x"))
    options = config("eva", eva_config=peft.EvaConfig(rho=RHO, tau=1 - 1e-6))
    forward: Any = lambda model, batch: model(batch)  # noqa: E731
    state = eva.get_eva_state_dict(
        Model(), [x], options, forward, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )  # fmt: skip
    return {f"{name}/eva": vectors.numpy() for name, vectors in state.items()}


def corda_changes(mode: str) -> dict[str, np.ndarray]:
    model, x = Model(), torch.from_numpy(draw("x"))
    options = config("corda", corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode))
    corda.preprocess_corda(model, options, run_model=lambda: model(x))
    model = peft.get_peft_model(model, options)
    layers = model.base_model.model
    return {f"{name}/{mode}": getattr(layers, name).get_delta_weight("default").detach().numpy() for name in SIZES}


def loraga_factors() -> dict[str, np.ndarray]:
    model, x, y = Model(), torch.from_numpy(draw("x")), torch.from_numpy(draw("y"))
    options = config("lora_ga", lora_ga_config=peft.tuners.lora.config.LoraGAConfig())
    loraga.preprocess_loraga(model, options, lambda: ((model(x) - y) ** 2).mean().backward())
    model = peft.get_peft_model(model, options)
    out = {}
    for name in SIZES:
        layer = getattr(model.base_model.model, name)
        out[f"{name}/lora_ga_A"] = layer.lora_A["default"].weight.detach().numpy()
        out[f"{name}/lora_ga_B"] = layer.lora_B["default"].weight.detach().numpy()
    return out


def records() -> dict[str, np.ndarray]:
    """Everything, by `layer/start`."""
    torch.manual_seed(0)
    return eva_components() | corda_changes("ipm") | corda_changes("kpm") | loraga_factors()


def main() -> None:
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **records())
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
