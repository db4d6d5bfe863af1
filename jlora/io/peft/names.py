"""Ready maps for `jlora.peft`: where common models of transformers keep the weights of a JAX program.

    jlora.peft.save("adapter", adapter, jlora.peft.names.LLAMA)
    jlora.peft.save("adapter", adapter, jlora.peft.names.under("params/", jlora.peft.names.BERT))

A map knows two layouts of a program: that of the Flax models of transformers (`h/0/attn/c_attn/kernel`), and that of
jlora's examples (`layers/0/attention/query/kernel`); each with a path for every layer, and with stacked layers
(`h/attn/c_attn/kernel`). Modules are called as in transformers 5. Patterns that match no path do no harm.

For another layout, `jlora.peft.infer_names` finds the map.
"""

import dataclasses
import re

from jlora.io.torch.module_names import KINDS, Entry, Kind, Module, Names, entry_of, modules_of

__all__ = [
    "BERT",
    "CLIP",
    "GEMMA",
    "GPT2",
    "LLAMA",
    "LLAMA_TIED",
    "MIXTRAL",
    "QWEN_MOE",
    "T5",
    "T5_TIED",
    "VIT",
    "WHISPER",
    "tied",
    "under",
]

# What the parameters of a layer are called in JAX, by the kind of the layer.
_WEIGHTS = {"linear": ["kernel"], "conv1d": ["kernel"], "conv": ["kernel"], "embedding": ["embedding"]}
_WEIGHTS |= {"norm": ["scale", "weight"]}


def under(prefix: str, names: Names, module: str = "") -> dict[str, Entry]:
    """The same map for a model inside of another one.

        under("params/bert/", BERT, "bert.")     # a BertForSequenceClassification, as Flax keeps its variables

    Arguments:
        prefix: of the paths.
        names: the map of the inner model.
        module: a prefix of the modules.
    """

    def moved(inner: Module) -> Module:
        head = None if inner.tied is None else module + inner.tied
        return dataclasses.replace(inner, name=module + inner.name, tied=head)

    return {prefix + path: entry_of([moved(inner) for inner in modules_of(entry)]) for path, entry in names.items()}


def tied(names: Names, embedding: str, head: str) -> dict[str, Entry]:
    """The same map for a model whose output head uses the weight of an embedding.

        tied(T5, "shared", "lm_head")

    Arguments:
        names: the map.
        embedding: the module of the embedding.
        head: the module of the head; it has no entry in the result.
    """
    out = {}
    for path, entry in names.items():
        first = next(iter(modules_of(entry)), None)
        if first is None or first.name not in (head, embedding):
            out[path] = entry
        elif first.name == embedding:
            out[path] = dataclasses.replace(first, tied=head)
    return out


def _map(*tables: str) -> dict[str, Entry]:
    """The map that tables describe; each line has a path, the module if it is not the path with dots, and the kind.

    `(a|b)` stands for several lines, in the module for the same number of names. `name:k` is part k of a module.
    """
    names: dict[str, Entry] = {}
    for line in filter(str.strip, "\n".join(tables).splitlines()):
        path, *module, kind = line.split()
        paths = _alternatives(path)
        modules = _alternatives(module[0] if module else path.replace("/", "."))
        for one, other in zip(paths, modules, strict=True):
            names |= _layer(one, other, kind)
    return names | {re.sub(r"[/_]\{i\}", "", path, count=1): entry for path, entry in names.items()}


def _alternatives(text: str) -> list[str]:
    match = re.search(r"\((.*?)\)", text)
    if match is None:
        return [text]
    return [rest for option in match[1].split("|") for rest in _alternatives(text.replace(match[0], option, 1))]


def _layer(path: str, module: str, kind: str) -> dict[str, Entry]:
    """The entries of one layer's weight and bias, or of one parameter."""
    name, _, number = module.partition(":")
    part = int(number) if number else None
    if kind == "parameter":
        return {path: Module(name, "parameter", part)}
    is_norm = kind == "norm"
    weight = entry_of([Module(f"{name}.weight", "parameter") if is_norm else Module(name, _kind(kind), part)])
    bias: dict[str, Entry] = {} if kind == "embedding" else {f"{path}/bias": Module(f"{name}.bias", "parameter", part)}
    return {f"{path}/{leaf}": weight for leaf in _WEIGHTS[kind]} | bias


def _kind(kind: str) -> Kind:
    return next(known for known in KINDS if known == kind)


BERT = _map(
    """
    embeddings/(word|position|token_type)_embeddings                  embedding
    embeddings/LayerNorm                                              norm
    encoder/layer/{i}/attention/self/(query|key|value)                linear
    encoder/layer/{i}/attention/output/dense                          linear
    encoder/layer/{i}/attention/output/LayerNorm                      norm
    encoder/layer/{i}/(intermediate|output)/dense                     linear
    encoder/layer/{i}/output/LayerNorm                                norm
    pooler/dense                                                      linear
    (word|position|type)_embedding    embeddings.(word|position|token_type)_embeddings                     embedding
    embedding_norm                    embeddings.LayerNorm                                                 norm
    layer_{i}/attention/(query|key|value)     encoder.layer.{i}.attention.self.(query|key|value)           linear
    layer_{i}/attention/out           encoder.layer.{i}.attention.output.dense                             linear
    layer_{i}/attention_norm          encoder.layer.{i}.attention.output.LayerNorm                         norm
    layer_{i}/feed_forward/(up|down)  encoder.layer.{i}.(intermediate|output).dense                        linear
    layer_{i}/feed_forward_norm       encoder.layer.{i}.output.LayerNorm                                   norm
    """
)

GPT2 = tied(
    _map(
        """
    transformer/(wte|wpe)                         embedding
    transformer/h/{i}/(ln_1|ln_2)                 norm
    transformer/h/{i}/attn/(c_attn|c_proj)        conv1d
    transformer/h/{i}/mlp/(c_fc|c_proj)           conv1d
    transformer/ln_f                              norm
    h/{i}/(ln_1|ln_2)                             transformer.h.{i}.(ln_1|ln_2)                        norm
    h/{i}/attn/(c_attn|c_proj)                    transformer.h.{i}.attn.(c_attn|c_proj)               conv1d
    h/{i}/mlp/(c_fc|c_proj)                       transformer.h.{i}.mlp.(c_fc|c_proj)                  conv1d
    (wte|wpe)                                     transformer.(wte|wpe)                                embedding
    ln_f                                          transformer.ln_f                                     norm
    (embed|positions)                             transformer.(wte|wpe)                                embedding
    layers/{i}/attention/(query|key|value)        transformer.h.{i}.attn.(c_attn:0|c_attn:1|c_attn:2)  conv1d
    layers/{i}/attention/out                      transformer.h.{i}.attn.c_proj                        conv1d
    layers/{i}/mlp/(up|down)                      transformer.h.{i}.mlp.(c_fc|c_proj)                  conv1d
    layers/{i}/(norm_1|norm_2)                    transformer.h.{i}.(ln_1|ln_2)                        norm
    norm                                          transformer.ln_f                                     norm
    """
    ),
    "transformer.wte",
    "lm_head",
)

_DECODER = """
    model/embed_tokens                                                embedding
    model/layers/{i}/self_attn/(q_proj|k_proj|v_proj|o_proj)          linear
    model/layers/{i}/self_attn/(q_norm|k_norm)                        norm
    model/layers/{i}/(input_layernorm|post_attention_layernorm)       norm
    model/norm                                                        norm
    lm_head                                                           linear
    embed                                 model.embed_tokens                                           embedding
    layers/{i}/attention/(query|key|value|out)  model.layers.{i}.self_attn.(q_proj|k_proj|v_proj|o_proj)     linear
    layers/{i}/attention/(query|key)_norm model.layers.{i}.self_attn.(q|k)_norm                        norm
    layers/{i}/(norm_1|norm_2)            model.layers.{i}.(input_layernorm|post_attention_layernorm)  norm
    norm                                  model.norm                                                   norm
    head                                  lm_head                                                      linear
    """
_MLP = """
    model/layers/{i}/mlp/(gate_proj|up_proj|down_proj)                linear
    layers/{i}/mlp/(gate|up|down)         model.layers.{i}.mlp.(gate_proj|up_proj|down_proj)           linear
    """
_EXPERTS = """
    model/layers/{i}/mlp/gate                                         linear
    model/layers/{i}/mlp/experts/(gate_up_proj|down_proj)             parameter
    layers/{i}/mlp/router                 model.layers.{i}.mlp.gate                                    linear
    layers/{i}/mlp/(gate_up|down)/kernel  model.layers.{i}.mlp.experts.(gate_up_proj|down_proj)        parameter
    """
LLAMA = _map(_DECODER, _MLP)  # and Mistral, Qwen2, Qwen3
LLAMA_TIED = tied(LLAMA, "model.embed_tokens", "lm_head")  # SmolLM, small Llamas and Qwens
GEMMA = tied(
    _map(_DECODER, _MLP, "model/layers/{i}/(pre_feedforward_layernorm|post_feedforward_layernorm) norm"),
    "model.embed_tokens",
    "lm_head",
)  # Gemma 2 and 3 for text
MIXTRAL = _map(_DECODER, _EXPERTS)
QWEN_MOE = _map(
    _DECODER,
    _EXPERTS,
    _MLP,  # of the layers without experts
    """
    model/layers/{i}/mlp/shared_expert/(gate_proj|up_proj|down_proj)  linear
    model/layers/{i}/mlp/shared_expert_gate                           linear
    """,
)

T5 = _map(
    """
    shared                                                                      embedding
    (encoder|decoder)/block/{i}/layer/0/SelfAttention/(q|k|v|o)                 linear
    (encoder|decoder)/block/{i}/layer/0/SelfAttention/relative_attention_bias   embedding
    (encoder|decoder)/block/{i}/layer/(0|1|2)/layer_norm                        norm
    decoder/block/{i}/layer/1/EncDecAttention/(q|k|v|o)                         linear
    encoder/block/{i}/layer/1/DenseReluDense/(wi|wi_0|wi_1|wo)                  linear
    decoder/block/{i}/layer/2/DenseReluDense/(wi|wi_0|wi_1|wo)                  linear
    (encoder|decoder)/final_layer_norm                                          norm
    lm_head                                                                     linear
    """
)  # and UMT5
T5_TIED = tied(T5, "shared", "lm_head")  # the first T5, and UMT5

VIT = _map(
    """
    embeddings/(cls_token|position_embeddings)                     parameter
    embeddings/patch_embeddings/projection                         conv
    encoder/layer/{i}/attention/attention/(query|key|value)        layers.{i}.attention.(q_proj|k_proj|v_proj)  linear
    encoder/layer/{i}/attention/output/dense                       layers.{i}.attention.o_proj                  linear
    encoder/layer/{i}/(intermediate|output)/dense                  layers.{i}.mlp.(fc1|fc2)                     linear
    encoder/layer/{i}/(layernorm_before|layernorm_after)           layers.{i}.(layernorm_before|layernorm_after)  norm
    layernorm                                                      norm
    pooler/dense                                                   linear
    """
)

CLIP = _map(
    """
    logit_scale                                                                        parameter
    text_model/embeddings/(token_embedding|position_embedding)                         embedding
    (text_model|vision_model)/encoder/layers/{i}/self_attn/(q_proj|k_proj|v_proj|out_proj)  linear
    (text_model|vision_model)/encoder/layers/{i}/(layer_norm1|layer_norm2)             norm
    (text_model|vision_model)/encoder/layers/{i}/mlp/(fc1|fc2)                         linear
    text_model/final_layer_norm                                                        norm
    vision_model/embeddings/class_embedding                                            parameter
    vision_model/embeddings/patch_embedding                                            conv
    vision_model/embeddings/position_embedding                                         embedding
    vision_model/(pre_layrnorm|post_layernorm)                                         norm
    (visual|text)_projection                                                           linear
    """
)

WHISPER = tied(
    _map(
        """
    model/encoder/(conv1|conv2)                                                        conv
    model/(encoder|decoder)/embed_positions                                            embedding
    model/decoder/embed_tokens                                                         embedding
    model/(encoder|decoder)/layers/{i}/self_attn/(q_proj|k_proj|v_proj|out_proj)       linear
    model/decoder/layers/{i}/encoder_attn/(q_proj|k_proj|v_proj|out_proj)              linear
    model/(encoder|decoder)/layers/{i}/(self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm)  norm
    model/(encoder|decoder)/layers/{i}/(fc1|fc2)                                       linear
    model/(encoder|decoder)/layer_norm                                                 norm
    proj_out                                                                           linear
    """
    ),
    "model.decoder.embed_tokens",
    "proj_out",
)
