"""Makes `kohya.npz` and `loralib.pt`: files of LyCORIS, diffusers and loralib, and the weights that they merge to.

For a small UNet and the layers of a text encoder the file holds the weights of some layers; for every adapter that
LyCORIS or diffusers made its file and the merged weights; for every adapter that jlora made its file and what LyCORIS
or diffusers, whichever reads it, makes of it.

    pip install -e ".[references]"
    PYTHONPATH=.:examples python -m tests.golden.kohya
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loralib  # pyright: ignore[reportMissingImports]
import lycoris.modules as lycoris  # pyright: ignore[reportMissingImports]
import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY  # pyright: ignore[reportMissingImports]
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin  # pyright: ignore[reportMissingImports]
from safetensors.torch import load, save
from torch import nn  # pyright: ignore[reportMissingImports]

import jlora
from tests.golden.kohya_models import key_of, layer, model_weights, models, modules, numbers, unet
from tests.support import kohya_files
from tests.support.kohya_files import CONV, EXPORTS, GOLDEN, LAYERS, LINEAR

Arrays = dict[str, np.ndarray]


# Adapters of LyCORIS: for the layers by their short names the class and its options.
MIXED: dict[str, tuple[Any, dict[str, Any]]] = {
    "query": (lycoris.LoConModule, {"lora_dim": 2, "alpha": 3}),
    "out": (lycoris.LoConModule, {"lora_dim": 2, "alpha": 1, "weight_decompose": True}),
    "key": (lycoris.LohaModule, {"lora_dim": 2, "alpha": 3}),
    "up": (lycoris.LokrModule, {"lora_dim": 1, "alpha": 3}),
    "time": (lycoris.LokrModule, {"lora_dim": 1, "alpha": 3, "decompose_both": True, "factor": 4}),
    "proj_in": (lycoris.LoConModule, {"lora_dim": 3, "alpha": 2}),
    "conv1": (lycoris.LoConModule, {"lora_dim": 2, "alpha": 3, "use_tucker": True}),
    "conv2": (lycoris.FullModule, {}),
    "shortcut": (lycoris.LokrModule, {"lora_dim": 100, "alpha": 3}),
    "norm": (lycoris.NormModule, {}),
    "te_query_0": (lycoris.LoConModule, {"lora_dim": 2, "alpha": 3, "rs_lora": True}),
    "te_query_1": (lycoris.LoConModule, {"lora_dim": 3, "alpha": 3}),
    "te_up_1": (lycoris.LoConModule, {"lora_dim": 1, "alpha": 1}),
}
CONVOLUTIONS = {
    "conv1": (lycoris.LohaModule, {"lora_dim": 2, "alpha": 3}),
    "conv2": (lycoris.LokrModule, {"lora_dim": 1, "alpha": 3}),
    "shortcut": (lycoris.LoConModule, {"lora_dim": 2, "alpha": 1, "weight_decompose": True}),
    "proj_in": (lycoris.LokrModule, {"lora_dim": 1, "alpha": 3}),
}
MORE = {
    "conv1": (lycoris.LoConModule, {"lora_dim": 2, "alpha": 1, "weight_decompose": True}),
    "conv2": (lycoris.LokrModule, {"lora_dim": 1, "alpha": 3, "use_tucker": True}),
    "key": (lycoris.LokrModule, {"lora_dim": 1, "alpha": 3, "full_matrix": True, "factor": 2}),
    "up": (lycoris.LokrModule, {"lora_dim": 3, "alpha": 2, "factor": 2}),
}
REFUSED = {
    "tucker": {"conv1": (lycoris.LohaModule, {"lora_dim": 2, "use_tucker": True})},
    "wd_on_in": {"key": (lycoris.LoConModule, {"lora_dim": 2, "weight_decompose": True, "wd_on_out": False})},
    "wd_loha": {"key": (lycoris.LohaModule, {"lora_dim": 2, "weight_decompose": True})},
    "ia3": {"key": (lycoris.IA3Module, {"train_on_input": True})},
    "oft": {"query": (lycoris.DiagOFTModule, {"lora_dim": 2})},
    "glora": {"query": (lycoris.GLoRAModule, {"lora_dim": 2})},
    "unbalanced": {"up": (lycoris.LokrModule, {"lora_dim": 1, "factor": 4, "unbalanced_factorization": True})},
}


def of_lycoris(
    name: str, adapted: dict[str, tuple[Any, dict[str, Any]]], key: Callable[[str], str], merge: bool = True
) -> Arrays:
    """The file of an adapter of LyCORIS, all its numbers at random, and the merged weights."""
    made, tensors, merged = models(), {}, {}
    for short, (module_class, options) in adapted.items():
        full = modules()[short]
        torch.manual_seed(0)
        module = module_class(key(full), layer(full, made), 1.0, **options)
        for parameter, p in module.named_parameters():
            if not parameter.startswith("org_"):
                start = p.data if "dora_scale" in parameter else 0
                p.data = start + numbers(f"{name} {short} {parameter}", *p.shape)
        state = {k: v.detach() for k, v in state_of(module).items() if v is not None}
        tensors |= {f"{key(full)}.{k}": v.clone().contiguous() for k, v in state.items()}
        merged |= merged_by(module, full) if merge else {}
    return {"file": as_bytes(tensors), **merged}


def state_of(module: Any) -> dict[str, torch.Tensor]:
    """The tensors that LyCORIS saves for a module that was not yet put into its model."""
    if isinstance(module, lycoris.FullModule):
        return {"diff": module.weight, "diff_b": module.bias}
    return module.custom_state_dict() or module.state_dict()


def merged_by(module: Any, name: str) -> Arrays:
    """The merged weight of a module of LyCORIS, and its merged bias if there is one.

    `get_merged_weight` multiplies LoHa and LoKr by their scale twice, and the forward pass once, which counts.
    """
    original = module.org_module[0].weight
    with torch.no_grad():
        weight, bias = module.get_merged_weight(shape=original.shape)
        if isinstance(module, (lycoris.LohaModule, lycoris.LokrModule)) and not module.wd:
            weight = original + module.get_weight(original.shape)
        if isinstance(module.org_module[0], nn.Linear):
            inputs = torch.eye(original.shape[1])
            outputs = module(inputs) - module(torch.zeros_like(inputs))
            np.testing.assert_allclose(outputs.T, weight, rtol=0, atol=1e-5)
    out = {f"merged {name}.weight": weight.detach().numpy()}
    return out if bias is None else out | {f"merged {name}.bias": bias.detach().numpy()}


def as_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> np.ndarray:
    return np.frombuffer(save(tensors, metadata), np.uint8)


def merge_by_lycoris(data: bytes) -> Arrays:
    """The weights that LyCORIS merges a file to."""
    made, state, merged = models(), load(data), {}
    for name in modules().values():
        kind, values = lycoris.get_module(state, key_of(name))
        if kind is not None:
            merged |= merged_by(lycoris.make_module(kind, values, key_of(name), layer(name, made)), name)
    return merged


def merge_by_diffusers(data: bytes) -> Arrays:
    """The weights of the UNet that diffusers merges a file to."""
    made = unet()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "f.safetensors").write_bytes(data)
        state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
            folder, weight_name="f.safetensors", unet_config=made.config, return_lora_metadata=True
        )
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, made, metadata=metadata)
    made.fuse_lora()
    return {
        f"merged {name}.weight": module.base_layer.weight.detach().numpy()
        for name in [*LINEAR.values(), *CONV.values()]
        if hasattr(module := layer(name, {"unet": made}), "base_layer")
    }


def adapted_unet(config: peft.LoraConfig) -> Any:
    made = unet()
    torch.manual_seed(0)
    made.add_adapter(config)
    for key, p in made.named_parameters():
        if "lora_" in key:
            p.data = (p.data if "magnitude" in key else 0) + numbers(f"adapter {key}", *p.shape)
    return made


def of_diffusers(**options: Any) -> Arrays:
    """The file that diffusers saves for an adapter of its UNet, and the merged weights."""
    made = adapted_unet(peft.LoraConfig(r=3, lora_alpha=5, **options))
    with tempfile.TemporaryDirectory() as folder:
        config = made.peft_config["default"].to_dict()
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder, peft.get_peft_model_state_dict(made), unet_lora_adapter_metadata=config
        )
        data = (Path(folder) / "pytorch_lora_weights.safetensors").read_bytes()
    return {"file": settled(data), **merge_by_diffusers(data)}


def settled(data: bytes) -> np.ndarray:
    """A file with the configuration alone in its metadata, and lists in order: PEFT writes some of them from sets."""
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    fields = json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
    fields = {k: sorted(v) if isinstance(v, list) else v for k, v in fields.items()}
    return as_bytes(load(data), {LORA_ADAPTER_METADATA_KEY: json.dumps(fields, sort_keys=True)})


TARGETS = [re.sub("^unet.", "", LAYERS[name]) for name in ("query", "key", "out", "conv1")]


def renamed(key: str) -> str:
    """A key as the first releases of diffusers wrote it."""
    key = re.sub(r"\.(to_q|to_k|to_v)\.lora_([AB])", r".processor.\1_lora.\2", key)
    key = re.sub(r"\.to_out\.0\.lora_([AB])", r".processor.to_out_lora.\1", key)
    key = re.sub(r"\.lora_([AB])", r".lora.\1", key)
    return key.replace(".A.", ".down.").replace(".B.", ".up.")


def of_old_diffusers() -> Arrays:
    state = load(of_diffusers(target_modules=TARGETS)["file"].tobytes())
    data = as_bytes({renamed(key): tensor for key, tensor in state.items()})
    return {"file": data, **merge_by_diffusers(data.tobytes())}


def of_kohya() -> Arrays:
    """A LoRA with kohya's keys, as LyCORIS saves it and diffusers reads it."""
    adapted = {name: (lycoris.LoConModule, {"lora_dim": 2, "alpha": 3}) for name in ("query", "out", "up", "conv1")}
    data = of_lycoris("kohya", adapted, key_of)["file"]
    return {"file": data, **merge_by_diffusers(data.tobytes())}


def bare_key(name: str) -> str:
    return f"lycoris_{name.partition('.')[2].replace('.', '_')}"


ADAPTERS: dict[str, Callable[[], Arrays]] = {
    "mixed": lambda: of_lycoris("mixed", MIXED, key_of),
    "convolutions": lambda: of_lycoris("convolutions", CONVOLUTIONS, key_of),
    "more": lambda: of_lycoris("more", MORE, key_of),
    "bare": lambda: of_lycoris("bare", {n: MIXED[n] for n in ("te_query_0", "te_query_1")}, bare_key),
    "kohya": of_kohya,
    "diffusers": lambda: of_diffusers(target_modules=TARGETS, rank_pattern={"to_k": 2}, alpha_pattern={"conv1": 7}),
    "diffusers_dora": lambda: of_diffusers(target_modules=TARGETS, use_dora=True, use_rslora=True),
    "old_diffusers": of_old_diffusers,
}


def export(name: str, state: Arrays) -> Arrays:
    """The file that jlora saves, and the weights that a library merges it to."""
    program = kohya_files.program_of("linen", state)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.safetensors"
        adapter = kohya_files.exported(name, program.sites)
        jlora.kohya.save(file, adapter, program.names, params=program.params, form=EXPORTS[name].form)
        data = file.read_bytes()
    by_lycoris = EXPORTS[name].form == "kohya"
    merged = merge_by_lycoris(data) if by_lycoris else merge_by_diffusers(data)
    if name == "lora":  # both read it
        for key, weight in merge_by_diffusers(data).items():
            np.testing.assert_allclose(weight, merged[key], rtol=0, atol=1e-5)
    return {"file": np.frombuffer(data, np.uint8), **merged}


def of_loralib() -> bytes:
    """The state dict of loralib for a linear layer and a merged one, in the file that torch writes."""
    made = nn.Sequential(loralib.Linear(4, 6, r=2), loralib.MergedLinear(4, 6, r=2, enable_lora=[True, False, True]))
    for key, p in made.named_parameters():
        p.data = numbers(key, *p.shape)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(loralib.lora_state_dict(made), Path(folder) / "lora.pt")
        return (Path(folder) / "lora.pt").read_bytes()


def records() -> Arrays:
    """All that the file holds."""
    state = model_weights()
    out = {f"model/weights/{key}": array for key, array in state.items()}
    for name, make in ADAPTERS.items():
        out |= {f"adapter/{name}/{key}": array for key, array in make().items()}
    for name, adapted in REFUSED.items():
        out[f"refused/{name}/file"] = of_lycoris(name, adapted, key_of, merge=False)["file"]
    for name in EXPORTS:
        out |= {f"export/{name}/{key}": array for key, array in export(name, state).items()}
    return out


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **records())  # pyright: ignore[reportArgumentType]
    GOLDEN.with_name("loralib.pt").write_bytes(of_loralib())
