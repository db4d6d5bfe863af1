"""Makes `peft_types.npz`: adapters of the types of PEFT that share arrays or read the weight, and what they compute.

For every adapter that PEFT made it holds its two files and the output of the model; for every adapter that jlora made,
its two files and the output of the model into which PEFT loaded them.

    pip install -e ".[references]"
    PYTHONPATH=.:examples python -m tests.golden.peft_types
"""

from __future__ import annotations

import tempfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft  # pyright: ignore[reportMissingImports]
import torch  # pyright: ignore[reportMissingImports]
from peft.tuners.lora import variants  # pyright: ignore[reportMissingImports]
from safetensors.numpy import load_file
from torch import nn  # pyright: ignore[reportMissingImports]

from tests.support import peft_types

TARGETS = ["layers.0", "layers.1", "out"]
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 12)
        for name, p in self.named_parameters():
            p.data = torch.from_numpy(numbers(name, *p.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(self.norm(x))


def numbers(name: str, *shape: int) -> np.ndarray:
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return np.asarray(0.5 * rng.normal(size=shape), np.float32)


ADAPTERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "tinylora": lambda: peft.TinyLoraConfig(r=2, u=3, weight_tying=1.0, target_modules=TARGETS),
    "vblora": lambda: peft.VBLoRAConfig(r=2, num_vectors=5, vector_length=4, topk=2, target_modules=TARGETS),
    "vblora_topk": lambda: peft.VBLoRAConfig(
        r=2, num_vectors=5, vector_length=4, topk=2, target_modules=TARGETS, save_only_topk_weights=True
    ),
    "unilora": lambda: peft.UniLoraConfig(r=2, theta_d_length=300, save_indices=True, target_modules=TARGETS),
    "pvera": lambda: peft.PveraConfig(r=3, target_modules=TARGETS),
    "monteclora": lambda: peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS,
        monteclora_config=peft.tuners.lora.config.MontecloraConfig(num_samples=4),
    ),
    "super_tuning": lambda: peft.SupertuningConfig(sparsity=0.8, target_modules=TARGETS),
    "frod": lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False, target_modules=TARGETS),
    "supra": lambda: peft.SupertuningConfig(sparsity=0.8, select_top=False, r=2, lora_alpha=3, target_modules=TARGETS),
    "beft": lambda: peft.BeftConfig(target_modules=TARGETS),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "peanut": lambda: peft.PeanutConfig(r=3, scaling=0.5, target_modules=TARGETS),
    "peanut_deep": lambda: peft.PeanutConfig(r=3, depth=2, act_fn="tanh", target_modules=TARGETS),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, alpha=6, target_modules=TARGETS),
    "bd_lora": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_bdlora=peft.BdLoraConfig(target_modules_bd_a=["out"], target_modules_bd_b=["0", "1"], nblocks=2),
        target_modules=TARGETS,
    ),
    "qalora": lambda: peft.LoraConfig(r=2, lora_alpha=6, use_qalora=True, qalora_group_size=4, target_modules=TARGETS),
    "kasa": lambda: peft.LoraConfig(r=2, lora_alpha=6, kasa_config=peft.KasaConfig(), target_modules=TARGETS),
    "osf": lambda: peft.OSFConfig(effective_rank=5, target_modules=TARGETS),
    "c3a": lambda: peft.C3AConfig(block_size=4, block_size_pattern={"out": 2}, target_modules=TARGETS),
    "fourierft": lambda: peft.FourierFTConfig(
        n_frequency=11, n_frequency_pattern={"out": 30}, scaling=40.0, random_loc_seed=5, target_modules=TARGETS
    ),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=19, scaling=2.0, target_modules=TARGETS),
    "shira": lambda: peft.ShiraConfig(r=1, target_modules=TARGETS),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=TARGETS),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=TARGETS),
    "delora": lambda: peft.DeloraConfig(r=2, delora_lambda=4, rank_pattern={"out": 3}, target_modules=TARGETS),
    "miss": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "miss_of_another_size": lambda: peft.MissConfig(r=3, target_modules=TARGETS),
    "miss_mini": lambda: peft.MissConfig(r=4, mini_r=4, init_weights="mini", target_modules=TARGETS),
    "glora": lambda: peft.GloraConfig(r=2, target_modules=TARGETS),
    "glora_vector": lambda: peft.GloraConfig(
        r=2, config_A_B="vector", config_C="vector", config_D_E="vector", target_modules=TARGETS
    ),
    "glora_constant": lambda: peft.GloraConfig(
        r=2, config_A_B="constant", config_C="none", config_D_E="none", bias="glora_only", target_modules=TARGETS
    ),
    "tinylora_wide": lambda: peft.TinyLoraConfig(r=9, u=3, weight_tying=1.0, target_modules=TARGETS),
    "osf_of_no_rank": lambda: peft.OSFConfig(effective_rank=8, rank_pattern={"out": 0.5}, target_modules=TARGETS),
    "hra_biases": lambda: peft.HRAConfig(r=2, bias="hra_only", target_modules=TARGETS),
    "all_biases": lambda: peft.LoraConfig(r=2, bias="all", target_modules=TARGETS[:2], modules_to_save=["norm"]),
    "glora_bias": lambda: peft.GloraConfig(r=2, config_A_B="none", config_C="vector", target_modules=TARGETS),
}


def output(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(numbers("x", 3, 8))).numpy()


def files(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.frombuffer((folder / name).read_bytes(), np.uint8) for name in FILES}


def adapted(name: str) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    made = peft.get_peft_model(Model(), ADAPTERS[name]()).eval()
    if name == "qalora":  # which PEFT has for GPTQ layers alone
        for layer in (*made.base_model.model.layers, made.base_model.model.out):
            layer.lora_variant["default"] = variants.QALoraLinearVariant
            variants.QALoraLinearVariant.init(layer, "default", ADAPTERS[name]())
    for key, p in made.named_parameters():
        if p.requires_grad:
            p.data += torch.from_numpy(numbers(f"{name} {key}", *p.shape))
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return files(Path(folder)) | {"y": output(made)}


def exported(name: str, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "adapter"
        peft_types.save(name, folder, state)
        with warnings.catch_warnings():  # of missing tensors, and of fields that PEFT does not know
            warnings.filterwarnings("error", "Found missing|Unexpected keyword|The cayley-neumann")
            made = peft.PeftModel.from_pretrained(Model(), str(folder)).eval()
        assert set(load_file(folder / FILES[1])) == set(peft.get_peft_model_state_dict(made)), name
        return files(folder) | {"y": output(made)}


def records() -> dict[str, np.ndarray]:
    """The arrays of the golden file."""
    state = {key: p.detach().numpy() for key, p in Model().named_parameters()}
    out = {f"model/all/{key}": value for key, value in state.items()}
    out |= {"input/all/x": numbers("x", 3, 8), "input/all/y": output(Model())}
    for name in ADAPTERS:
        out |= {f"adapter/{name}/{key}": value for key, value in adapted(name).items()}
    for name in peft_types.EXPORTS:
        out |= {f"export/{name}/{key}": value for key, value in exported(name, state).items()}
    return out


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, **records())
    print(path, path.stat().st_size, "bytes")
