"""The models of torch for which `exchange.py` makes adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from tests.support.peft_models import KV, D, E, F, H, L, T, V

SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "max_position_embeddings": T,
    "intermediate_size": F,
}
DECODER: dict[str, Any] = SIZES | {
    "num_key_value_heads": KV,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
}


def llama(tied: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=tied, **DECODER))


TORCH: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_positions=T, bos_token_id=1, eos_token_id=2
        )
    ),
    "llama": lambda: llama(False),
    "llama_tied": lambda: llama(True),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            num_local_experts=E,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            **DECODER,
        )
    ),
    "cnn": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)
    ),
}
