"""A small UNet and the layers of a text encoder with fixed weights, for `kohya.py`."""

from __future__ import annotations

import zlib

import diffusers  # pyright: ignore[reportMissingImports]
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from tests.support.kohya_files import ENCODED, LAYERS

Arrays = dict[str, np.ndarray]


def numbers(name: str, *shape: int) -> torch.Tensor:
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return torch.from_numpy(np.asarray(0.3 * rng.normal(size=shape), np.float32))


def unet() -> nn.Module:
    """A UNet with fixed weights."""
    made = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(6, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=10,
        attention_head_dim=2,
        norm_num_groups=2,
    ).eval()
    for key, p in made.named_parameters():
        p.data = numbers(key, *p.shape)
    return made


class Encoder(nn.Module):
    """The layers of a text encoder that are adapted, with the names that they have in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.Module()
        self.text_model.encoder = nn.Module()
        self.text_model.encoder.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.text_model.encoder.layers:
            layer.self_attn, layer.mlp = nn.Module(), nn.Module()
            layer.self_attn.q_proj, layer.mlp.fc1 = nn.Linear(8, 8), nn.Linear(8, 12)
        for key, p in self.named_parameters():
            p.data = numbers(f"te {key}", *p.shape)


def models() -> dict[str, nn.Module]:
    return {"unet": unet(), "text_encoder": Encoder()}


def modules() -> dict[str, str]:
    """Every adapted layer: its name by a short one."""
    return LAYERS | {f"{short}_{i}": name.format(i=i) for short, name in ENCODED.items() for i in range(2)}


def layer(name: str, made: dict[str, nn.Module]) -> nn.Module:
    component, _, rest = name.partition(".")
    return made[component].get_submodule(rest)


def key_of(name: str) -> str:
    """A name as kohya's scripts spell it."""
    component, _, rest = name.partition(".")
    return f"{ {'unet': 'lora_unet', 'text_encoder': 'lora_te'}[component] }_{rest.replace('.', '_')}"


def model_weights() -> Arrays:
    made, out = models(), {}
    for name in modules().values():
        out |= {f"{name}.{key}": p.detach().numpy() for key, p in layer(name, made).named_parameters()}
    return out
