"""What llama.cpp calls a module, and which rows of its weight it puts in another order."""

import re
from collections.abc import Iterable

import numpy as np

from jlora._tree.paths import closest_matches

# Architectures whose converter puts the rows of query and key into the order of pairs: llama.cpp rotates neighbours,
# and Hugging Face's Llama the two halves of each head. Of all others jlora asks.
PERMUTED = ("llama", "minicpm", "arctic")
PLAIN = ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt2", "bert")
_QUERY, _KEY = r"blk\.\d+\.attn_q", r"blk\.\d+\.attn_k"
_OF_LLAMA_CPP = r"blk\.\d+\..*|token_embd|output"


def is_permuted(architecture: str, permute: bool | None) -> bool:
    """Whether rows of query and key are in another order than in Hugging Face's weights.

    Raises:
        ValueError: if that is not known of the architecture, and not stated.
    """
    if permute is None and architecture not in (*PERMUTED, *PLAIN):
        raise ValueError(
            f"jlora does not know whether llama.cpp's converter permutes query and key of {architecture!r}: pass "
            "permute=True or permute=False, as its convert_hf_to_gguf.py does for this architecture."
        )
    return architecture in PERMUTED if permute is None else permute


def num_heads_of(module: str, num_heads: int | None, num_kv_heads: int | None) -> int | None:
    """The number of heads whose rows are permuted in a module; None if it is neither query nor key.

    Raises:
        ValueError: if the number is needed and not given.
    """
    is_query, is_key = re.fullmatch(_QUERY, module), re.fullmatch(_KEY, module)
    if not is_query and not is_key:
        return None
    count = num_heads if is_query or num_kv_heads is None else num_kv_heads
    if count is None:
        raise ValueError(f"llama.cpp has the rows of {module} in another order: pass num_heads= and num_kv_heads=.")
    return count


def to_pairs(rows: np.ndarray, num_heads: int, module: str) -> np.ndarray:
    """Rows in the order of llama.cpp: from the two halves of each head to pairs of neighbours."""
    return _reordered(rows, (num_heads, 2, -1), num_heads, module)


def to_halves(rows: np.ndarray, num_heads: int, module: str) -> np.ndarray:
    """The inverse of `to_pairs`."""
    return _reordered(rows, (num_heads, -1, 2), num_heads, module)


def _reordered(rows: np.ndarray, split: tuple[int, int, int], num_heads: int, module: str) -> np.ndarray:
    if num_heads < 1 or len(rows) % (2 * num_heads):
        raise ValueError(f"{module} has {len(rows)} rows, which are not {num_heads} heads of an even size.")
    return rows.reshape(*split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def names_in_llama_cpp(names: Iterable[str], architecture: str) -> dict[str, str]:
    """What llama.cpp calls each module: names of Hugging Face, or llama.cpp's own.

    Raises:
        ValueError: if the architecture is not known, or has no such module.
        ModuleNotFoundError: if the package gguf is needed and not installed.
    """
    names = list(names)
    native = {name: name for name in names if re.fullmatch(_OF_LLAMA_CPP, name)}
    foreign = [name for name in names if name not in native]
    if not foreign:
        return native
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Names of Hugging Face need the package gguf: pip install gguf. llama.cpp's own names (blk.{i}.attn_q) "
            "do without."
        ) from error
    architectures = {text: key for key, text in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in architectures:
        raise ValueError(f"gguf has no architecture {architecture!r} ({closest_matches(architecture, architectures)}).")
    blocks = 1 + max((int(number) for name in names for number in re.findall(r"\d+", name)), default=0)
    mapping = gguf.get_tensor_name_map(architectures[architecture], blocks)
    renamed = {name: mapping.get_name(name) for name in foreign}
    unnamed = [name for name, module in renamed.items() if module is None]
    if unnamed:
        raise ValueError(
            f"llama.cpp's {architecture} has no module for {', '.join(unnamed)}: leave them out, or name the module as "
            "llama.cpp does (blk.{i}.attn_q)."
        )
    return native | {name: module for name, module in renamed.items() if module is not None}
