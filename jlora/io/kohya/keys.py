"""What kohya's and diffusers' files call a module, from its name in torch.

A key of kohya replaces the dots of a name by underscores, so it has no inverse of its own: the names of the user's map
are spelled as keys, and a key belongs to the name that it is the spelling of.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

Form = Literal["kohya", "diffusers"]

# A component of a pipeline, which a name starts with, and the prefixes of its keys; the first one is written.
PREFIXES: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet", "lora_transformer"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
_BARE = ("lycoris",)  # of a name without a component: LyCORIS on any model of torch
_FIRST_OF_SEVERAL = "lora_te1"  # the text encoder, if there is a second one

# What the tensors of a module are called, and by what endings. Old files of diffusers have the last ones.
TENSORS: dict[str, tuple[str, ...]] = {
    "lora_down": ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "lora_up": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "lora_magnitude_vector": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
_PLAIN = (
    *("alpha", "dora_scale", "lora_mid.weight", "diff", "diff_b", "w_norm", "b_norm"),
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
# Endings of methods that jlora does not read, by what they are called.
REFUSED = {
    "oft_blocks": "OFT of LyCORIS",
    "oft_diag": "OFT of kohya",
    "a1.weight": "GLoRA of LyCORIS",
    "a2.weight": "GLoRA of LyCORIS",
    "b1.weight": "GLoRA of LyCORIS",
    "b2.weight": "GLoRA of LyCORIS",
    "on_input": "IA3 of LyCORIS",
    "weight": "a weight in full, or IA3 of LyCORIS",
    "rescale": "a rescaled OFT of LyCORIS",
    "scalar": "a trained scale of LyCORIS beside its factors",
    "lora_B.bias": "a bias beside the factor B",
}
_ENDINGS = {ending: name for name, endings in TENSORS.items() for ending in endings}
_ENDINGS |= {ending: ending.removesuffix(".weight") for ending in _PLAIN} | {ending: ending for ending in REFUSED}
# The first files of diffusers kept the tensors of attention in its processor.
_OLD_ENDINGS = {"down.weight": "lora_down", "up.weight": "lora_up"}
_OLD_MODULES = (
    (r"(.*)\.(to_q|to_k|to_v)", r"\1.processor.\2_lora"),
    (r"(.*)\.to_out\.0", r"\1.processor.to_out_lora"),
    (r"(text_encoder.*\.self_attn)\.(q|k|v|out)_proj", r"\1.to_\2_lora"),
)

Tensors = Mapping[str, np.ndarray]
ByKey = dict[str, dict[str, np.ndarray]]


def split_key(key: str) -> tuple[str, str] | None:
    """The module part of a tensor's key and what the tensor is; None for an unknown ending."""
    parts = key.split(".")
    for count in (3, 2, 1):  # the longest ending first
        module, ending = ".".join(parts[:-count]), ".".join(parts[-count:])
        if module and ending in _ENDINGS:
            return module, _ENDINGS[ending]
        if module.endswith("_lora") and ending in _OLD_ENDINGS:
            return module, _OLD_ENDINGS[ending]
    return None


def by_module(tensors: Tensors) -> tuple[ByKey, list[str]]:
    """The tensors of each module by what they are, and the keys with an unknown ending.

    Raises:
        ValueError: if a module has the same tensor twice, by two endings.
    """
    modules: ByKey = collections.defaultdict(dict)
    unknown = []
    for key, tensor in tensors.items():
        split = split_key(key)
        if split is None:
            unknown.append(key)
        elif split[1] in modules[split[0]]:
            raise ValueError(f"The file has {split[1]} of {split[0]} twice, the second time as {key}.")
        else:
            modules[split[0]][split[1]] = tensor
    return modules, unknown


def spellings(name: str) -> list[str]:
    """All that a file may call a module."""
    component, _, rest = name.partition(".")
    flat = (rest if component in PREFIXES else name).replace(".", "_")
    old = (re.sub(pattern, new, name) for pattern, new in _OLD_MODULES if re.fullmatch(pattern, name))
    return [name, *(f"{prefix}_{flat}" for prefix in PREFIXES.get(component, _BARE)), *old]


def key_of(name: str, form: Form, names: Iterable[str]) -> str:
    """What a file that is written calls a module.

    Arguments:
        name: of the module.
        form: of the file.
        names: of all modules; they tell whether there is a second text encoder.
    """
    if form == "diffusers":
        return name
    component, _, rest = name.partition(".")
    if component == "text_encoder" and any(other.startswith("text_encoder_2.") for other in names):
        return f"{_FIRST_OF_SEVERAL}_{rest.replace('.', '_')}"
    return spellings(name)[1]


def names_by_key(names: Iterable[str]) -> dict[str, str]:
    """The name that each possible key belongs to.

    Raises:
        ValueError: if two names have the same spelling.
    """
    by_key: dict[str, str] = {}
    for name in names:
        for key in spellings(name):
            if by_key.setdefault(key, name) != name:
                raise ValueError(
                    f"{by_key[key]} and {name} are both spelled {key} in a file of kohya. Leave one of them out of the "
                    "names, or use the other form."
                )
    return by_key
