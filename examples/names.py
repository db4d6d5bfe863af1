"""The torch modules that hold the weights of common models, for `jlora.peft`: paths on the left, modules on the right.

`{i}` is an index. An index absent from the path enumerates the stacked axis of a weight that `scan` runs over. A map
for another model is a few such lines.
"""

from __future__ import annotations

from jlora.io.peft import Module, Names


def stacked(names: Names) -> Names:
    """The same map for a model whose layers are stacked for `scan`: one weight for all of them."""
    return {path.replace("layers/{i}/", "layers/"): module for path, module in names.items()}


def under(prefix: str, names: Names) -> Names:
    """The same map for paths with a prefix, such as `params/`."""
    return {prefix + path: module for path, module in names.items()}


# transformers' BertModel, and `minilm.py`, whose variables are under `params/`.
_LAYER = "encoder.layer.{i}"
BERT: Names = {
    "word_embedding/embedding": Module("embeddings.word_embeddings", "embedding"),
    "position_embedding/embedding": Module("embeddings.position_embeddings", "embedding"),
    "type_embedding/embedding": Module("embeddings.token_type_embeddings", "embedding"),
    "embedding_norm/scale": Module("embeddings.LayerNorm.weight", "parameter"),
    "embedding_norm/bias": Module("embeddings.LayerNorm.bias", "parameter"),
    "layer_{i}/attention/query/kernel": f"{_LAYER}.attention.self.query",
    "layer_{i}/attention/query/bias": Module(f"{_LAYER}.attention.self.query.bias", "parameter"),
    "layer_{i}/attention/key/kernel": f"{_LAYER}.attention.self.key",
    "layer_{i}/attention/key/bias": Module(f"{_LAYER}.attention.self.key.bias", "parameter"),
    "layer_{i}/attention/value/kernel": f"{_LAYER}.attention.self.value",
    "layer_{i}/attention/value/bias": Module(f"{_LAYER}.attention.self.value.bias", "parameter"),
    "layer_{i}/attention/out/kernel": f"{_LAYER}.attention.output.dense",
    "layer_{i}/attention/out/bias": Module(f"{_LAYER}.attention.output.dense.bias", "parameter"),
    "layer_{i}/attention_norm/scale": Module(f"{_LAYER}.attention.output.LayerNorm.weight", "parameter"),
    "layer_{i}/attention_norm/bias": Module(f"{_LAYER}.attention.output.LayerNorm.bias", "parameter"),
    "layer_{i}/feed_forward/up/kernel": f"{_LAYER}.intermediate.dense",
    "layer_{i}/feed_forward/up/bias": Module(f"{_LAYER}.intermediate.dense.bias", "parameter"),
    "layer_{i}/feed_forward/down/kernel": f"{_LAYER}.output.dense",
    "layer_{i}/feed_forward/down/bias": Module(f"{_LAYER}.output.dense.bias", "parameter"),
    "layer_{i}/feed_forward_norm/scale": Module(f"{_LAYER}.output.LayerNorm.weight", "parameter"),
    "layer_{i}/feed_forward_norm/bias": Module(f"{_LAYER}.output.LayerNorm.bias", "parameter"),
}

# transformers' GPT2LMHeadModel: one layer computes query, key and value there, and the embedding is also the head.
_LAYER = "transformer.h.{i}"
GPT2: Names = {
    "embed/embedding": Module("transformer.wte", "embedding", tied="lm_head"),
    "positions/embedding": Module("transformer.wpe", "embedding"),
    "layers/{i}/attention/query/kernel": Module(f"{_LAYER}.attn.c_attn", "conv1d", part=0),
    "layers/{i}/attention/key/kernel": Module(f"{_LAYER}.attn.c_attn", "conv1d", part=1),
    "layers/{i}/attention/value/kernel": Module(f"{_LAYER}.attn.c_attn", "conv1d", part=2),
    "layers/{i}/attention/out/kernel": Module(f"{_LAYER}.attn.c_proj", "conv1d"),
    "layers/{i}/attention/query/bias": Module(f"{_LAYER}.attn.c_attn.bias", "parameter", part=0),
    "layers/{i}/attention/key/bias": Module(f"{_LAYER}.attn.c_attn.bias", "parameter", part=1),
    "layers/{i}/attention/value/bias": Module(f"{_LAYER}.attn.c_attn.bias", "parameter", part=2),
    "layers/{i}/attention/out/bias": Module(f"{_LAYER}.attn.c_proj.bias", "parameter"),
    "layers/{i}/mlp/up/kernel": Module(f"{_LAYER}.mlp.c_fc", "conv1d"),
    "layers/{i}/mlp/up/bias": Module(f"{_LAYER}.mlp.c_fc.bias", "parameter"),
    "layers/{i}/mlp/down/kernel": Module(f"{_LAYER}.mlp.c_proj", "conv1d"),
    "layers/{i}/mlp/down/bias": Module(f"{_LAYER}.mlp.c_proj.bias", "parameter"),
    "layers/{i}/norm_1/scale": Module(f"{_LAYER}.ln_1.weight", "parameter"),
    "layers/{i}/norm_1/bias": Module(f"{_LAYER}.ln_1.bias", "parameter"),
    "layers/{i}/norm_2/scale": Module(f"{_LAYER}.ln_2.weight", "parameter"),
    "layers/{i}/norm_2/bias": Module(f"{_LAYER}.ln_2.bias", "parameter"),
    "norm/scale": Module("transformer.ln_f.weight", "parameter"),
    "norm/bias": Module("transformer.ln_f.bias", "parameter"),
}

# transformers' LlamaForCausalLM, and models with the same modules: Mistral, Qwen.
_LAYER = "model.layers.{i}"
LLAMA: dict[str, str | Module] = {
    "embed/embedding": Module("model.embed_tokens", "embedding"),
    "head/kernel": "lm_head",
    "norm/scale": Module("model.norm.weight", "parameter"),
    "layers/{i}/attention/query/kernel": f"{_LAYER}.self_attn.q_proj",
    "layers/{i}/attention/key/kernel": f"{_LAYER}.self_attn.k_proj",
    "layers/{i}/attention/value/kernel": f"{_LAYER}.self_attn.v_proj",
    "layers/{i}/attention/out/kernel": f"{_LAYER}.self_attn.o_proj",
    "layers/{i}/mlp/gate/kernel": f"{_LAYER}.mlp.gate_proj",
    "layers/{i}/mlp/up/kernel": f"{_LAYER}.mlp.up_proj",
    "layers/{i}/mlp/down/kernel": f"{_LAYER}.mlp.down_proj",
    "layers/{i}/norm_1/scale": Module(f"{_LAYER}.input_layernorm.weight", "parameter"),
    "layers/{i}/norm_2/scale": Module(f"{_LAYER}.post_attention_layernorm.weight", "parameter"),
}

# The same if the embedding is also the output head: SmolLM, small Llamas.
LLAMA_TIED: Names = {**LLAMA, "embed/embedding": Module("model.embed_tokens", "embedding", tied="lm_head")}

# transformers' MixtralForCausalLM: Llama with experts, whose kernels are three-dimensional parameters.
MIXTRAL: Names = {path: module for path, module in LLAMA.items() if "/mlp/" not in path} | {
    "layers/{i}/mlp/router/kernel": f"{_LAYER}.mlp.gate",
    "layers/{i}/mlp/gate_up/kernel": Module(f"{_LAYER}.mlp.experts.gate_up_proj", "parameter"),
    "layers/{i}/mlp/down/kernel": Module(f"{_LAYER}.mlp.experts.down_proj", "parameter"),
}
