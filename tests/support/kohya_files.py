"""Parts of a small UNet and of its text encoder as programs of JAX, and adapters that jlora saves for them.

`golden/kohya.py` records their weights, files of other libraries for them, and what those libraries merge.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jlora
from jlora.kohya import Module, Names
from tests.support.recorded import Sections, sections

GOLDEN = Path(__file__).parents[1] / "golden" / "kohya.npz"
BOUND = 1e-5  # of the largest entry, in float32

AT = "unet.down_blocks.0.attentions.0"
BLOCK = f"{AT}.transformer_blocks.0"
RESNET = "unet.down_blocks.1.resnets.0"
ENCODER = "text_encoder.text_model.encoder.layers"
# The layers of the UNet whose weights are adapted, and those of each layer of the text encoder.
LINEAR = {
    "query": f"{BLOCK}.attn1.to_q",
    "out": f"{BLOCK}.attn1.to_out.0",
    "key": f"{BLOCK}.attn2.to_k",
    "up": f"{BLOCK}.ff.net.0.proj",
    "time": f"{RESNET}.time_emb_proj",
}
CONV = {
    "proj_in": f"{AT}.proj_in",
    "conv1": f"{RESNET}.conv1",
    "conv2": f"{RESNET}.conv2",
    "shortcut": f"{RESNET}.conv_shortcut",
}
NORM = {"norm": f"{RESNET}.norm1"}
ENCODED = {"te_query": f"{ENCODER}.{{i}}.self_attn.q_proj", "te_up": f"{ENCODER}.{{i}}.mlp.fc1"}
CHANNELS = 6  # that the norm has
LAYERS = {**LINEAR, **CONV, **NORM}
Weights = dict[str, np.ndarray]


@functools.cache
def golden() -> Sections:
    """The recorded arrays by section, name and key."""
    return sections(GOLDEN)


def weights() -> Weights:
    return golden()["model"]["weights"]


def kernel(weight: np.ndarray) -> np.ndarray:
    """A weight of torch in the layout of Flax: (in, out), (height, width, in, out)."""
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


class Linen(nn.Module):
    """Every layer on ones, and the stacked layers of the text encoder in a scan."""

    shapes: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        out = []
        for name in LINEAR:
            n_out, n_in = self.shapes[name]
            out.append(nn.Dense(n_out, use_bias=False, name=name)(jnp.ones((2, n_in))))
        for name in CONV:
            n_out, n_in, *window = self.shapes[name]
            out.append(nn.Conv(n_out, window, name=name)(jnp.ones((1, 4, 4, n_in))))
        out.append(nn.GroupNorm(2, name="norm")(x))
        for name in ENCODED:
            count, n_out, n_in = self.shapes[name]
            stack = self.param(name, nn.initializers.zeros, (count, n_in, n_out))
            y = jnp.ones((2, n_in))
            out.append(jax.lax.scan(lambda c, w, y=y: (c, y @ w), None, stack)[1])
        return out


class NNX(nnx.Module):
    """The layers of the UNet."""

    def __init__(self, shapes: Any) -> None:
        rngs = nnx.Rngs(0)
        for name in LINEAR:
            n_out, n_in = shapes[name]
            setattr(self, name, nnx.Linear(n_in, n_out, use_bias=False, rngs=rngs))
        for name in CONV:
            n_out, n_in, *window = shapes[name]
            setattr(self, name, nnx.Conv(n_in, n_out, window, rngs=rngs))
        self.norm = nnx.GroupNorm(shapes["norm"][0], 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> list[jax.Array]:
        out = [getattr(self, name)(jnp.ones((2, getattr(self, name).in_features))) for name in LINEAR]
        out += [getattr(self, name)(jnp.ones((1, 4, 4, getattr(self, name).in_features))) for name in CONV]
        return [*out, self.norm(x)]


def torch_named(params: dict[str, jax.Array], x: jax.Array) -> list[jax.Array]:
    """The layers with the names and layouts of torch."""
    out = []
    for module in LINEAR.values():
        weight = params[f"{module}.weight"]
        out.append(jnp.ones((2, weight.shape[1])) @ weight.T)
    for module in CONV.values():
        weight = params[f"{module}.weight"]
        images = jnp.ones((1, weight.shape[1], 4, 4))
        y = jax.lax.conv_general_dilated(images, weight, (1, 1), "SAME")
        out.append(y + params[f"{module}.bias"][None, :, None, None])
    scale, bias = (params[f"{NORM['norm']}.{name}"][None, None, None] for name in ("weight", "bias"))
    return [*out, x * scale + bias]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program of the layers.

    Arguments:
        apply: from parameters and an input.
        params: the parameters with the recorded weights.
        names: the map.
        torch: from parameters to torch's weights by name.
    """

    apply: Callable[..., Any]
    params: Any
    names: Names
    torch: Callable[[Any], Weights]

    @functools.cached_property
    def sites(self) -> jlora.Sites:
        return jlora.trace(self.apply, self.params, jnp.ones((1, 1, 1, CHANNELS)))


def stacked(module: str, state: Weights) -> np.ndarray:
    return np.stack([state[f"{module.format(i=i)}.weight"] for i in range(2)])


def flax_params(state: Weights) -> dict[str, Any]:
    """The parameters of the UNet's layers as both modules of Flax have them."""
    params: dict[str, Any] = {
        name: {"kernel": kernel(state[f"{module}.weight"])} for name, module in {**LINEAR, **CONV}.items()
    }
    for name, module in CONV.items():
        params[name]["bias"] = state[f"{module}.bias"]
    params["norm"] = {"scale": state[f"{NORM['norm']}.weight"], "bias": state[f"{NORM['norm']}.bias"]}
    return jax.tree.map(jnp.asarray, params)


def flax_names() -> dict[str, Any]:
    names: dict[str, Any] = {f"{name}/kernel": module for name, module in LINEAR.items()}
    names |= {f"{name}/kernel": Module(module, "conv") for name, module in CONV.items()}
    names |= {f"{name}/bias": Module(f"{module}.bias", "parameter") for name, module in {**CONV, **NORM}.items()}
    return names | {"norm/scale": Module(f"{NORM['norm']}.weight", "parameter")}


def to_torch(params: Any) -> Weights:
    """The inverse of `flax_params`."""
    state = {}
    for name, module in {**LINEAR, **CONV}.items():
        weight = np.asarray(params[name]["kernel"])
        state[f"{module}.weight"] = weight.T if weight.ndim == 2 else weight.transpose(3, 2, 0, 1)
    state |= {f"{module}.bias": np.asarray(params[name]["bias"]) for name, module in {**CONV, **NORM}.items()}
    return state | {f"{NORM['norm']}.weight": np.asarray(params["norm"]["scale"])}


def encoder_to_torch(params: Any) -> Weights:
    return {
        f"{module.format(i=i)}.weight": np.asarray(params[name][i]).T
        for name, module in ENCODED.items()
        for i in range(2)
    }


@functools.cache
def program(kind: str) -> Program:
    """The program with torch's names, of Linen or of NNX, with the recorded weights."""
    return program_of(kind, weights())


def program_of(kind: str, state: Weights) -> Program:
    """The program with other weights."""
    shapes = {name: state[f"{module}.weight"].shape for name, module in LAYERS.items()}
    shapes |= {name: stacked(module, state).shape for name, module in ENCODED.items()}
    if kind == "torch":
        names = {f"{module}.weight": module for module in LINEAR.values()}
        names |= {f"{module}.weight": Module(module, "conv") for module in CONV.values()}
        parameters = [f"{m}.bias" for m in CONV.values()] + [f"{NORM['norm']}.{p}" for p in ("weight", "bias")]
        names |= {name: Module(name, "parameter") for name in parameters}
        params = {name: jnp.asarray(state[name]) for name in names}
        return Program(torch_named, params, names, lambda params: {k: np.asarray(v) for k, v in params.items()})
    if kind == "nnx":
        graph, variables = nnx.split(NNX(shapes))
        nnx.replace_by_pure_dict(variables, flax_params(state))
        return Program(
            lambda params, x: nnx.merge(graph, params)(x),
            variables,
            flax_names(),
            lambda params: to_torch(nnx.to_pure_dict(params)),
        )
    params = flax_params(state)
    params |= {name: jnp.asarray(stacked(module, state).swapaxes(1, 2)) for name, module in ENCODED.items()}
    names = {f"params/{path}": module for path, module in {**flax_names(), **ENCODED}.items()}
    apply = Linen({name: tuple(shape) for name, shape in shapes.items()}).apply
    return Program(
        apply,
        {"params": params},
        names,
        lambda params: to_torch(params["params"]) | encoder_to_torch(params["params"]),
    )


@dataclasses.dataclass(frozen=True)
class Export:
    """An adapter that jlora saves: the method of every path of the Linen program that a pattern matches, and a form."""

    targets: dict[str, jlora.Method]
    form: Any = "kohya"
    scale: float = 1.0


LORA = jlora.LoRA(2, 5.0)
EXPORTS = {
    "lora": Export(
        {".*/(query|out|key|up|te_query|te_up)(/kernel)?": LORA, ".*/(proj_in|conv1)/kernel": jlora.LoRA(3)}
    ),
    "lycoris": Export(
        {
            ".*/(query|time)/kernel": jlora.LoHa(2, 3.0),
            ".*/up/kernel": jlora.LoKr(1, 3.0),
            ".*/key/kernel": jlora.LoKr(None),
            ".*/out/kernel": jlora.DoRA(2, 3.0),
            ".*/conv1/kernel": jlora.LoCon(2, 3.0),
            ".*/conv2/.*": jlora.Full(),
            ".*/proj_in/kernel": jlora.LoCon(2),
            ".*/shortcut/kernel": jlora.LoHa(1),
            ".*/norm/.*": jlora.Full(),
            ".*/te_up": jlora.LoRA(2, rank_stabilized=True, alpha=3.0),
        },
        scale=0.5,
    ),
    "lycoris_conv": Export({".*/conv1/kernel": jlora.LoKr(1, 3.0), ".*/conv2/kernel": jlora.LoHa(2, 3.0)}),
    "diffusers": Export({".*/(query|key)/kernel": LORA, ".*/(conv1|proj_in)/kernel": jlora.LoRA(3)}, "diffusers", 0.3),
    "diffusers_dora": Export({".*/(query|up|conv1)/kernel": jlora.DoRA(2, 3.0)}, "diffusers"),
    "converted": Export({".*/up/kernel": jlora.Additive(1, 3.0), ".*/key/kernel": jlora.AdaLoRA(2)}),
}


def exported(name: str, sites: jlora.Sites) -> jlora.Adapter:
    """The adapter of an export, all its numbers at random."""
    adapter = jlora.init(jax.random.key(0), sites, EXPORTS[name].targets)

    def draw(path: str, factor: str, array: jax.Array) -> jax.Array:
        rng = np.random.RandomState(zlib.crc32(f"{name} {path} {factor}".encode()))
        return jnp.asarray(0.3 * rng.normal(size=array.shape), jnp.float32)

    drawn = {
        path: dataclasses.replace(update, factors={f: draw(path, f, a) for f, a in update.factors.items()})
        for path, update in adapter.items()
    }
    return jlora.scale(drawn, EXPORTS[name].scale)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference in units of the largest entry; infinite if the shapes differ."""
    if actual.shape != expected.shape:
        return np.inf
    return float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-3))


def write(data: np.ndarray, path: Path) -> Path:
    path.write_bytes(data.tobytes())
    return path
