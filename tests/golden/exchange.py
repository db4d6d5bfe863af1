"""Makes `exchange.npz`: models of torch with fixed weights, adapters of PEFT for them, and what they compute.

For every model the file holds its weights, an input and the output; for every adapter that PEFT made its two files and
the output; for every adapter that jlora made its two files and the output of the model into which PEFT loaded them.

    pip install -e ".[references]"
    PYTHONPATH=.:examples python -m tests.golden.exchange
"""

from __future__ import annotations

import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from peft.tuners.lora.config import CordaConfig, LoraGAConfig, VeloraConfig  # pyright: ignore[reportMissingImports]
from peft.tuners.lora.corda import preprocess_corda  # pyright: ignore[reportMissingImports]
from peft.tuners.lora.loraga import preprocess_loraga  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from tests.golden.exchange_models import TORCH
from tests.support import peft_exports
from tests.support.peft_models import MODELS, T, V

FILES = ("adapter_config.json", "adapter_model.safetensors")
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5}
IN_ATTENTION = ["q_proj", "v_proj"]


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=list(targets), **(LORA | options))


def adalora(*targets: str, **options: Any) -> peft.AdaLoraConfig:
    sizes: dict[str, Any] = {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10}
    return peft.AdaLoraConfig(target_modules=list(targets), **sizes, **options)


# Adapters that PEFT makes, each for a model.
ADAPTERS: dict[str, tuple[str, Callable[[], peft.PeftConfig]]] = {
    "lora": ("bert", lambda: lora("query", "value", "dense")),
    "stabilized": ("bert", lambda: lora("query", use_rslora=True)),
    "patterns": (
        "bert",
        lambda: lora(
            "query",
            "key",
            rank_pattern={"layer.1.attention.self.query": 2, "key": 4},
            alpha_pattern={r"^encoder\.layer\.0.*query": 7},
            exclude_modules=["layer.0.attention.self.key"],
        ),
    ),
    "layers": ("bert", lambda: lora("query", layers_to_transform=[1], layers_pattern="layer")),
    "embedding": ("bert", lambda: lora("word_embeddings", "query")),
    "positions": ("bert", lambda: lora("position_embeddings")),
    "dora": ("bert", lambda: lora("word_embeddings", "query", "output.dense", use_dora=True)),
    "bias_beside": ("bert", lambda: lora("query", bias="lora_only")),
    "bias_all": ("bert", lambda: lora("query", bias="all")),
    "modules_to_save": ("bert", lambda: lora("query", modules_to_save=["intermediate.dense", "embeddings.LayerNorm"])),
    "loha": ("bert", lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["query", "output.dense"])),
    "lokr": ("bert", lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["intermediate.dense"])),
    "lokr_both": (
        "bert",
        lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["output.dense"], decompose_both=True, decompose_factor=8),
    ),
    "lokr_whole": ("bert", lambda: peft.LoKrConfig(r=8, alpha=3, target_modules=["output.dense"])),
    "vera": ("bert", lambda: peft.VeraConfig(r=4, target_modules=["query", "output.dense"])),
    "ia3": (
        "bert",
        lambda: peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
    ),
    "conv1d": ("gpt2", lambda: lora("c_attn", "c_proj", fan_in_fan_out=True)),
    "conv1d_dora": ("gpt2", lambda: lora("c_attn", "c_fc", fan_in_fan_out=True, use_dora=True)),
    "conv1d_bias": ("gpt2", lambda: lora("c_attn", fan_in_fan_out=True, bias="lora_only")),
    "conv1d_ia3": (
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "decoder": ("llama", lambda: lora(*IN_ATTENTION, "gate_proj", "up_proj", "down_proj")),
    "all_linear": ("llama", lambda: peft.LoraConfig(target_modules="all-linear", **LORA)),
    "expression": ("llama", lambda: peft.LoraConfig(target_modules=r".*\.(q|o)_proj", **LORA)),
    "with_base": ("llama", lambda: lora("embed_tokens", "q_proj")),
    "head": ("llama", lambda: lora("q_proj", modules_to_save=["lm_head"])),
    "decoder_dora": ("llama", lambda: lora("o_proj", "gate_proj", "up_proj", use_dora=True)),
    "tokens": ("llama", lambda: lora("q_proj", trainable_token_indices=[1, 5, 7])),
    "tokens_alone": (
        "llama",
        lambda: peft.TrainableTokensConfig(token_indices=[2, 9], target_modules=["embed_tokens"]),
    ),
    "tokens_tied": ("llama_tied", lambda: lora("q_proj", trainable_token_indices={"embed_tokens": [1, 5]})),
    "tied": ("llama_tied", lambda: lora("embed_tokens", "q_proj", ensure_weight_tying=True)),
    "compressed": ("bert", lambda: lora("query", velora_config=VeloraConfig())),
    "tied_saved": ("llama_tied", lambda: lora("q_proj", modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "tokens_alone_tied": (
        "llama_tied",
        lambda: peft.TrainableTokensConfig(token_indices=[2, 9], target_modules=["embed_tokens"]),
    ),
    "experts": (
        "mixtral",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
            **LORA,
        ),
    ),
    "one_parameter": (
        "mixtral",
        lambda: peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"], **LORA),
    ),
    "drawn": ("bert", lambda: peft.VeraConfig(r=4, target_modules=["query", "output.dense"], save_projection=False)),
    "output_bias": ("bert", lambda: lora("query", "output.dense", lora_bias=True)),
    "output_bias_beside": ("bert", lambda: lora("query", lora_bias=True, bias="lora_only")),
    "conv1d_output_bias": ("gpt2", lambda: lora("c_attn", lora_bias=True, fan_in_fan_out=True)),
    "pissa": ("llama", lambda: lora("q_proj", "down_proj", "embed_tokens", init_lora_weights="pissa")),
    "pissa_dora": ("bert", lambda: lora("query", "output.dense", init_lora_weights="pissa", use_dora=True)),
    "conv1d_pissa": ("gpt2", lambda: lora("c_attn", "c_proj", init_lora_weights="pissa", fan_in_fan_out=True)),
    "olora": ("bert", lambda: lora("query", "dense", init_lora_weights="olora", use_rslora=True)),
    "pissa_iterated": ("bert", lambda: lora("query", "output.dense", init_lora_weights="pissa_niter_2")),
    "corda": ("bert", lambda: lora("query", "output.dense", init_lora_weights="corda")),
    "lora_ga": ("bert", lambda: lora("query", "output.dense", init_lora_weights="lora_ga")),
    "adalora": ("bert", lambda: adalora("query", "dense")),
    "adalora_pruned": ("bert", lambda: adalora("query", "output.dense", alpha_pattern={"query": 7}, use_rslora=True)),
    "convolution_adalora": ("cnn", lambda: adalora("0", "5")),
    "weights": (
        "bert",
        lambda: peft.LoraConfig(
            target_modules=[],
            target_parameters=["query.weight", "word_embeddings.weight"],
            rank_pattern={"query.weight": 2},
            **LORA,
        ),
    ),
    "conv1d_weights": (
        "gpt2",
        lambda: peft.LoraConfig(target_modules=[], target_parameters=["c_attn.weight", "wpe.weight"], **LORA),
    ),
    "weights_pissa": (
        "llama",
        lambda: peft.LoraConfig(
            target_modules=["up_proj"], target_parameters=["q_proj.weight"], init_lora_weights="pissa", **LORA
        ),
    ),
    "convolution_output_bias": ("cnn", lambda: lora("0", "5", lora_bias=True)),
    "effective_loha": (
        "cnn",
        lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["0", "2"], use_effective_conv2d=True),
    ),
    "effective_lokr": (
        "cnn",
        lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["0", "2", "5"], use_effective_conv2d=True),
    ),
    "convolution": ("cnn", lambda: lora("0", "2", "5")),
    "convolution_dora": ("cnn", lambda: lora("0", "2", "5", use_dora=True)),
    "convolution_loha": ("cnn", lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=["0", "2"])),
    "convolution_lokr": ("cnn", lambda: peft.LoKrConfig(r=1, alpha=3, target_modules=["0", "2", "5"])),
    "convolution_lokr_whole": (
        "cnn",
        lambda: peft.LoKrConfig(r=8, alpha=3, target_modules=["0", "2"], decompose_factor=2),
    ),
    "convolution_ia3": ("cnn", lambda: peft.IA3Config(target_modules=["0", "2", "5"], feedforward_modules=["2"])),
}


def numbers(name: str, *shape: int) -> np.ndarray:
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return np.asarray(0.3 * rng.normal(size=shape), np.float32)


def model(name: str) -> nn.Module:
    """A model with fixed weights."""
    made = TORCH[name]().eval()
    for key, p in made.named_parameters():
        p.data = torch.from_numpy(numbers(f"{name} {key}", *p.shape) + ("norm" in key.lower() and "weight" in key))
    return made


def example(name: str) -> np.ndarray:
    if name == "cnn":
        return numbers("x", 2, 3, 6, 6)
    return np.random.RandomState(1).randint(0, V, (2, T)).astype(np.int32)


def output(made: nn.Module, name: str) -> np.ndarray:
    x = torch.from_numpy(example(name))
    with torch.no_grad():
        out = made(x) if name == "cnn" else made(input_ids=x.long())
    y = out if name == "cnn" else out.last_hidden_state.mean(1) if name == "bert" else out.logits
    return y.numpy()


def state(made: nn.Module) -> dict[str, np.ndarray]:
    return {key: p.detach().numpy() for key, p in made.named_parameters()}


def files(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.frombuffer((folder / name).read_bytes(), np.uint8) for name in FILES}


def prepare(name: str, base: nn.Module, config: peft.PeftConfig) -> None:
    """What CorDA and LoRA-GA do with data before the adapter is made."""
    x = torch.from_numpy(example("bert")).long()
    if name == "corda":
        config.corda_config = CordaConfig()
        preprocess_corda(base, config, run_model=lambda: base(x[:1]))
    if name == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, train_step=lambda: base(x).last_hidden_state.square().mean().backward())


def prune(made: peft.PeftModel) -> None:
    """What AdaLoRA's allocation of ranks leaves: all ranks of a layer, some, or none."""
    pattern = {}
    for key, e in made.base_model.model.named_parameters():
        if "lora_E" in key:
            keep = [[True, False, True], [False] * 3, [True] * 3][len(pattern) % 3]
            pattern[key] = keep
            e.data[~torch.tensor(keep)] = 0
    made.peft_config["default"].rank_pattern = pattern


RELATIVE = ("pissa_iterated", "corda", "lora_ga")  # to a base that the base and the configuration do not determine


def adapted(name: str) -> dict[str, np.ndarray]:
    """An adapter of PEFT, all its numbers at random."""
    own, make_config = ADAPTERS[name]
    torch.manual_seed(0)
    base, config = model(own), make_config()
    prepare(name, base, config)
    made = peft.get_peft_model(base, config).eval()
    before = {}
    if name in RELATIVE:
        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            before = {"start": files(Path(folder))[FILES[1]]}
    for key, p in made.named_parameters():
        if p.requires_grad:
            p.data += torch.from_numpy(numbers(f"{name} {key}", *p.shape))  # in place: some share their numbers
    if name == "adalora_pruned":
        prune(made)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return files(Path(folder)) | before | {"y": output(made, own)}


def exported(name: str) -> dict[str, np.ndarray]:
    """An adapter of jlora, and what PEFT makes of it without a warning."""
    model_name = peft_exports.EXPORTS[name].model
    own = MODELS[model_name].torch
    base = model(own)
    params, sites = peft_exports.program(model_name, state(base))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        peft_exports.save(name, folder, params, sites)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)  # of transformers about PEFT
            made = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        return files(folder) | {"y": output(made, own)}


def records() -> dict[str, np.ndarray]:
    """Everything, by `section/name/array`; an adapter's name has that of its model in front."""
    out = {}
    for name in TORCH:
        made = model(name)
        out |= {f"model/{name}/{key}": value for key, value in state(made).items()}
        out |= {f"input/{name}/x": example(name), f"input/{name}/y": output(made, name)}
    for name in ADAPTERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out |= {f"adapter/{ADAPTERS[name][0]} {name}/{key}": value for key, value in adapted(name).items()}
    for name in peft_exports.EXPORTS:
        out |= {f"export/{name}/{key}": value for key, value in exported(name).items()}
    return out


def main() -> None:
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **records())
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
