"""Forms of PEFT's tensors that a plain form equals: each becomes that one as it is read."""

import math

import numpy as np

from jlora.io.peft.config import Config
from jlora.io.peft.targets import is_target_parameter
from jlora.io.peft.tensors import Tensors
from jlora.io.torch.module_names import Kind

# What the forms below are made of, beside the tensors of the plain forms.
SUFFIXES = ("hada_t1", "hada_t2", "lokr_t2", "lora_A", "lora_B", "lora_E")


def parameter_of(config: Config, name: str) -> str:
    """The name that the configuration's patterns see: of a linear layer in `target_parameters` that of its weight."""
    weight = f"{name}.weight"
    return weight if is_target_parameter(config, weight) else name


def plain(config: Config, name: str, tensors: Tensors, kind: Kind, kernel: tuple[int, ...] = ()) -> Tensors:
    """A module's tensors in the plain form of its method.

    Arguments:
        config: the configuration.
        name: of the module.
        tensors: of the module, by suffix.
        kind: of the module.
        kernel: of a convolution the channels and every spatial axis.

    Raises:
        ValueError: if the tensors of another form do not fit together.
    """
    has_core = config.get("use_effective_conv2d") and math.prod(kernel[1:]) > 1
    if has_core and "lokr_w2_a" in tensors and "lokr_t2" not in tensors:
        raise ValueError(f"{name} has no lokr_t2, and the configuration has use_effective_conv2d.")
    try:
        for suffixes, convert in _FORMS.items():
            if set(suffixes) <= set(tensors):
                converted = convert([tensors[suffix] for suffix in suffixes], kind, kernel)
                tensors = {suffix: t for suffix, t in tensors.items() if suffix not in suffixes} | converted
        if parameter_of(config, name) != name and set(tensors) == {"lora_A.weight", "lora_B.weight"}:
            tensors = _of_parameter(tensors["lora_A.weight"], tensors["lora_B.weight"], kind)
    except (ValueError, IndexError) as error:
        shapes = {suffix: tensor.shape for suffix, tensor in tensors.items()}
        raise ValueError(f"{name} has tensors that do not fit together, {shapes}.") from error
    return tensors


def _loha(tensors: list[np.ndarray], *_: object) -> Tensors:
    """LoHa with a core for each window of a convolution (`use_effective_conv2d`).

    With p the outputs and c the channels, `t[i, j, *window] a[i, p] b[j, c]` is a product of rank i over p and (c,
    window).
    """
    t1, a1, b1, t2, a2, b2 = tensors
    return {
        "hada_w1_a": np.ascontiguousarray(a1.T),
        "hada_w1_b": _with_core(t1, b1),
        "hada_w2_a": np.ascontiguousarray(a2.T),
        "hada_w2_b": _with_core(t2, b2),
    }


def _lokr(tensors: list[np.ndarray], *_: object) -> Tensors:
    """LoKr whose second factor has such a core."""
    t, a, b = tensors
    return {"lokr_w2_a": np.ascontiguousarray(a.T), "lokr_w2_b": _with_core(t, b)}


def _with_core(core: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`sum_j core[i, j, *window] b[j, c]` as a matrix (i, (c window)), in float32 or wider."""
    dtype = np.promote_types(np.promote_types(core.dtype, b.dtype), np.float32)
    return np.einsum("ij...,jc->ic...", core.astype(dtype), b.astype(dtype)).reshape(len(core), -1)


def _adalora(tensors: list[np.ndarray], kind: Kind, kernel: tuple[int, ...]) -> Tensors:
    """AdaLoRA's `B diag(e) A`, with e in B."""
    a, b, e = tensors
    dtype = np.promote_types(np.promote_types(b.dtype, e.dtype), np.float32)
    b = b.astype(dtype) * e.astype(dtype).reshape(1, -1)
    if kind == "conv" and kernel:
        a, b = a.reshape(len(a), *kernel), b.reshape(*b.shape, *[1] * len(kernel[1:]))
    return {"lora_A.weight": a, "lora_B.weight": b}


def _of_parameter(a: np.ndarray, b: np.ndarray, kind: Kind) -> Tensors:
    """`target_parameters` of a layer's weight: B A has the axes of torch's weight, whatever these are."""
    if kind != "linear":
        a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
    if kind == "embedding":
        return {"lora_embedding_A": a, "lora_embedding_B": b}
    return {"lora_A.weight": a, "lora_B.weight": b}


_FORMS = {
    ("hada_t1", "hada_w1_a", "hada_w1_b", "hada_t2", "hada_w2_a", "hada_w2_b"): _loha,
    ("lokr_t2", "lokr_w2_a", "lokr_w2_b"): _lokr,
    ("lora_A", "lora_B", "lora_E"): _adalora,
}
