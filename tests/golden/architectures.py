"""Makes `architectures.json`: the tensors of small models of transformers, by their names in the model and in its file.

For every model the file has `state`, the names in its `state_dict` with shape and value (null if the elements differ);
`tied`, names with the name whose storage they share; and `file`, if `save_pretrained` uses other names, those names
with the name of the tensor that has their values (null for a part of one).

    pip install -e ".[references]"
    PYTHONPATH=. python -m tests.golden.architectures
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers as t  # pyright: ignore[reportMissingImports]
from safetensors import safe_open

V, D, H, KV, K, F, L, E = 37, 16, 4, 2, 4, 24, 2, 3  # words, width, heads, of them for keys, head size, hidden, ...
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "intermediate_size": F,
    "max_position_embeddings": 14,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER: dict[str, Any] = SIZES | {"num_key_value_heads": KV, "head_dim": K}
EXPERTS: dict[str, Any] = DECODER | {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
IMAGE: dict[str, Any] = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
IMAGE |= {"intermediate_size": F, "image_size": 8, "patch_size": 4, "projection_dim": 8}
T5: dict[str, Any] = {"vocab_size": V, "d_model": D, "d_kv": K, "d_ff": F, "num_layers": L, "num_heads": H}
TIED_T5: dict[str, Any] = T5 | {"tie_word_embeddings": True}
WHISPER: dict[str, Any] = {
    **{"vocab_size": V, "d_model": D, "encoder_layers": L, "decoder_layers": L, "num_mel_bins": 6},
    **{"encoder_attention_heads": H, "decoder_attention_heads": H, "encoder_ffn_dim": F, "decoder_ffn_dim": F},
    **{"max_source_positions": 10, "max_target_positions": 12, "pad_token_id": 0, "bos_token_id": 1},
    **{"eos_token_id": 2, "decoder_start_token_id": 1},
}

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": lambda: t.BertModel(t.BertConfig(**SIZES)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=14)),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**DECODER)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**DECODER)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**DECODER, num_local_experts=E)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=12)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**EXPERTS)),
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**TIED_T5)),
    "t5_gated": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "umt5": lambda: t.UMT5ForConditionalGeneration(t.UMT5Config(**TIED_T5)),
    "vit": lambda: t.ViTModel(t.ViTConfig(**IMAGE)),
    "clip": lambda: t.CLIPModel(
        t.CLIPConfig(text_config=SIZES | {"projection_dim": 8}, vision_config=IMAGE, projection_dim=8)
    ),
    "whisper": lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)),
    # Models without a map.
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**DECODER)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
    "distilbert": lambda: t.DistilBertModel(
        t.DistilBertConfig(vocab_size=V, dim=D, n_layers=L, n_heads=H, hidden_dim=F, max_position_embeddings=14)
    ),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**SIZES, ffn_dim=F, word_embed_proj_dim=D)),
    "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2)),
    "mamba": lambda: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=V, hidden_size=D, num_hidden_layers=L, state_size=4, intermediate_size=2 * D)
    ),
}


def entry(tensor: torch.Tensor) -> list[Any]:
    """The shape, and the value of all elements; None if they differ."""
    first = tensor.flatten()[0]
    return [list(tensor.shape), first.item() if bool((tensor == first).all()) else None]


def record(name: str) -> dict[str, Any]:
    """What the file holds of a model."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    floating = {key: tensor for key, tensor in model.state_dict().items() if tensor.is_floating_point()}
    first: dict[int, str] = {}
    tied = {}
    for key, tensor in floating.items():
        owner = first.setdefault(tensor.data_ptr(), key)
        if owner != key:
            tied[key] = owner
    out: dict[str, Any] = {"state": {key: entry(tensor) for key, tensor in floating.items()}}
    for tensor in floating.values():
        tensor.normal_()  # so that every tensor has values of its own
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if not set(saved) <= set(floating):
        out["file"] = {name: source(tensor, floating) for name, tensor in saved.items()}
    return out | ({"tied": tied} if tied else {})


def source(tensor: torch.Tensor, state: dict[str, torch.Tensor]) -> str | None:
    """The name of the tensor with the same values."""
    return next((key for key, other in state.items() if torch.equal(tensor, other)), None)


def records() -> dict[str, Any]:
    """Everything, by model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: record(name) for name in MODELS}


def main() -> None:
    path = Path(__file__).with_suffix(".json")
    lines = [f'"{name}": {json.dumps(one, separators=(",", ":"))}' for name, one in records().items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
