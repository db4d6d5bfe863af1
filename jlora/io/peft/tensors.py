"""Tensors of PEFT's files: what each method calls its factors, and the order of their axes."""

import dataclasses
import math
import os
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jlora.io.torch.factor_layout import TERMS, Part, kind
from jlora.io.torch.module_names import Owner

# For every factor its name in the file and its axes there: a letter is a joint axis as in `TERMS`, two letters one axis
# of both, C the channels and every axis of the kernel, X a part of the channels and the same, S as many axes of size 1.
_LORA = {"a": ("lora_A.weight", "r i"), "b": ("lora_B.weight", "o r")}
_EMBEDDING = {"a": ("lora_embedding_A", "r i"), "b": ("lora_embedding_B", "o r")}
_CONV = {"a": ("lora_A.weight", "r C"), "b": ("lora_B.weight", "o r S")}
_MAGNITUDE = {"m": ("lora_magnitude_vector", "o")}
_LOHA = {"b0": ("hada_w1_a", "o r"), "a0": ("hada_w1_b", "r i"), "b1": ("hada_w2_a", "o r"), "a1": ("hada_w2_b", "r i")}
_LOKR = {
    "c": ("lokr_w1", "y w"),
    "ca": ("lokr_w1_b", "r w"),
    "cb": ("lokr_w1_a", "y r"),
    "d": ("lokr_w2", "z x"),
    "a": ("lokr_w2_b", "s x"),
    "b": ("lokr_w2_a", "z s"),
}
FORMS: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("LoRA", "linear"): _LORA,
    ("LoRA", "embedding"): _EMBEDDING,
    ("LoRA", "conv"): _CONV,
    ("LoRA", "parameter"): {"a": ("lora_A.weight", "er i"), "b": ("lora_B.weight", "o re")},
    ("DoRA", "linear"): _LORA | _MAGNITUDE,
    ("DoRA", "embedding"): _EMBEDDING | _MAGNITUDE,
    ("DoRA", "conv"): _CONV | {"m": ("lora_magnitude_vector", "1 o S")},
    ("LoHa", "linear"): _LOHA,
    ("LoHa", "conv"): _LOHA,
    ("LoKr", "linear"): _LOKR,
    ("LoKr", "conv"): _LOKR | {"d": ("lokr_w2", "z X")},
    ("VeRA", "linear"): {"d": ("vera_lambda_d", "r"), "b": ("vera_lambda_b", "o")},
    ("IA3", "linear"): {"l": ("ia3_l", "o 1")},
    ("IA3", "conv"): {"l": ("ia3_l", "1 o S")},
    ("IA3 in", "linear"): {"l": ("ia3_l", "1 c")},
    ("IA3 in", "conv"): {"l": ("ia3_l", "1 c S")},
    ("Full", "linear"): {"d": ("weight", "o i")},
    ("Full", "conv1d"): {"d": ("weight", "i o")},
    ("Full", "embedding"): {"d": ("weight", "i o")},
    ("Full", "conv"): {"d": ("weight", "o C")},
    ("Full vector", "parameter"): {"d": ("", "o")},
}
_JOINED = str.maketrans("CX", "ix")
SUFFIXES = sorted({suffix for (m, _), form in FORMS.items() if m[:4] != "Full" for suffix, _ in form.values()})
Tensors = dict[str, np.ndarray]
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the letters that are known, and of a kernel its channels and spatial axes."""

    letters: Mapping[str, int]
    kernel: tuple[int, ...] = ()

    def axes(self, spelled: str) -> list[tuple[int | None, ...]]:
        """For every axis of a tensor the sizes of its letters, None for one that is not known."""
        out: list[tuple[int | None, ...]] = []
        for token in spelled.split():
            if token == "C":
                out += [(n,) for n in self.kernel]
            elif token == "X":
                joint, window = self.letters.get("x"), self.kernel[1:]
                out += [(joint and joint // math.prod(window),), *((n,) for n in window)]
            elif token == "S":
                out += [(1,)] * (len(self.kernel) - 1)
            else:
                out.append(tuple(1 if c == "1" else self.letters.get(c) for c in token))
        return out


def sizes_of(own: list[Owner]) -> Sizes:
    """What is known of the tensors of a module."""
    place = own[0].place
    letters = {"i": place.count("in"), "c": math.prod(place.channels)}
    if place.pieces == 1:
        letters["o"] = sum(o.place.count("out") for o in own)
    if place.experts:
        letters["e"] = place.experts[0]
    return Sizes(letters, place.kernel)


def form(method: str, kind: str, where: str) -> dict[str, tuple[str, str]]:
    """A method's tensors for a kind of module.

    Raises:
        ValueError: where PEFT has none.
    """
    flipped = kind == "conv1d" and method in ("LoRA", "DoRA", "VeRA", "IA3", "IA3 in")  # those that PEFT has for it
    found = FORMS.get((method, "linear" if flipped else kind))
    if found is None:
        raise ValueError(
            f"{method} of {where}, {kind}, has no form in PEFT's files that jlora knows. An update of low rank becomes "
            "a LoRA by jlora.to_lora."
        )
    return found


def write(array: np.ndarray, term: str, spelled: str, sizes: Sizes, where: str) -> np.ndarray:
    """A factor as the file has it."""
    order = [c.translate(_JOINED) for c in spelled if c not in "1S "]
    array = array.transpose([term.index(c) for c in order])
    known = dict(zip(order, array.shape, strict=True))
    full = dataclasses.replace(sizes, letters={**sizes.letters, **known})
    return np.ascontiguousarray(array.reshape([math.prod(n or 1 for n in axis) for axis in full.axes(spelled)]))


def read(tensor: np.ndarray, term: str, spelled: str, sizes: Sizes, where: str) -> np.ndarray:
    """A factor from the file.

    Raises:
        ValueError: where the shape is another one than the sizes say.
    """
    axes = sizes.axes(spelled)
    fits = len(axes) == tensor.ndim and all(
        n % known == 0 if None in axis else n == known
        for axis, n in zip(axes, tensor.shape, strict=True)
        for known in [math.prod(k for k in axis if k is not None)]
    )
    if not fits:
        said = " x ".join("*".join("any" if n is None else str(n) for n in axis) for axis in axes)
        grouped = ""
        if spelled == "r C" and tensor.ndim == len(axes) and tensor.shape[1] % sizes.kernel[0] == 0:
            grouped = " It spans all channels of a grouped convolution, so no update of the kernel equals it."
        raise ValueError(f"{where} has shape {tensor.shape}, and {said} was expected.{grouped}")
    parts, letters = [], []
    for token, axis, n in zip(_tokens(spelled, sizes), axes, tensor.shape, strict=True):
        for c, size in zip(token, axis, strict=True):
            if c not in "1S":
                parts.append(size if size is not None else n // math.prod(k for k in axis if k is not None))
                letters.append(c)
    array = tensor.reshape(parts)
    joined = [c for k, c in enumerate(letters) if c not in "CX" or k == letters.index(c)]
    shape = [math.prod(n for n, d in zip(parts, letters, strict=True) if d == c) for c in joined]
    names = "".join(joined).translate(_JOINED)
    return array.reshape(shape).transpose([names.index(c) for c in term])


def _tokens(spelled: str, sizes: Sizes) -> list[str]:
    """One token an axis."""
    many = {"C": len(sizes.kernel), "X": len(sizes.kernel), "S": len(sizes.kernel) - 1}
    return [token for token in spelled.split() for _ in range(many.get(token, 1))]


def written(name: str, part: Part) -> Tensors:
    """A module's tensors by what PEFT calls them."""
    place, piece = part
    known = form(kind(piece.method, place.is_matrix), place.module.kind, name)
    sizes = Sizes({"e": place.experts[0]} if place.experts else {}, place.kernel)
    return {
        known[factor][0]: write(array, piece.terms[factor], known[factor][1], sizes, name)
        for factor, array in piece.flat.items()
    }


def save_file(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors by name."""
    plain = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    with open(path, "wb") as file:
        file.write(safetensors.numpy.save(plain, metadata={"format": "pt"}))


def load_file(path: str | os.PathLike[str]) -> Tensors:
    """Reads tensors by name, bfloat16 included.

    Raises:
        ValueError: where the file is damaged, or holds a dtype that no factor has.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            parts = [(name, file.get_slice(name)) for name in file.offset_keys()]
            said = [(name, part.get_dtype(), part.get_shape()) for name, part in parts]
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    data = np.fromfile(path, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")  # the size of the header, and the header
    out = {}
    for name, spelled, shape in said:  # one after the other without a gap, as the library made sure
        if spelled not in _DTYPES:
            raise ValueError(f"{name} in {path} has the dtype {spelled}; factors have {', '.join(_DTYPES)}.")
        dtype = jnp.dtype(_DTYPES[spelled])
        stop = start + math.prod(shape) * dtype.itemsize
        out[name] = data[start:stop].view(dtype).reshape(shape)
        start = stop
    return dict(sorted(out.items()))


assert all(set(form) <= set(TERMS[method]) for (method, _), form in FORMS.items())
