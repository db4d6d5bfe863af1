"""LoRA adapters in GGUF files, as llama.cpp reads them."""

import os

from jlora._trace.sites import Sites
from jlora._tree.paths import Tree
from jlora.io.file_paths import absolute
from jlora.io.gguf import container
from jlora.io.gguf.read import Heads, read_adapter
from jlora.io.gguf.write import file_of
from jlora.io.torch.module_names import Module as Module
from jlora.io.torch.module_names import Names as Names
from jlora.io.torch.module_names import check_inputs
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single, with_static_scale
from jlora.methods._sharing import untie


def load(
    path: str | os.PathLike[str],
    sites: Sites,
    names: Names,
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    permute: bool | None = None,
) -> Adapter:
    """Reads a LoRA from a GGUF file that llama.cpp's converter or `jlora.gguf.save` wrote.

        names = {"layers/{i}/query/kernel": "model.layers.{i}.self_attn.q_proj"}
        adapter = jlora.gguf.load("lora.gguf", sites, names, num_heads=32, num_kv_heads=8)

    llama.cpp has the rows of query and key of Llama in another order than Hugging Face; they are put back.

    Arguments:
        path: the file.
        sites: from `jlora.trace`, of the program that is to be adapted.
        names: as for `jlora.peft.load`: modules of Hugging Face, or of llama.cpp (`blk.{i}.attn_q`).
        num_heads, num_kv_heads: the numbers of heads of query and of key; needed if their rows are in another order.
        permute: whether they are. None takes it from the architecture that the file names; False if the program itself
            has llama.cpp's order.

    Returns:
        the adapter. Its arrays have the dtypes of the file; those of 4 and 8 bits become float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, is no LoRA, or does not fit the program; the message states what to do.
        ModuleNotFoundError: if names of Hugging Face need the package gguf, and it is not installed.
    """
    check_inputs(sites, names)
    fields, tensors = container.read(absolute(path))
    return read_adapter(fields, tensors, sites, names, Heads(num_heads, num_kv_heads, permute))


def save(
    path: str | os.PathLike[str],
    adapter: Adapter,
    names: Names,
    architecture: str,
    *,
    params: Tree = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    permute: bool | None = None,
) -> tuple[str, ...]:
    """Writes a LoRA to a new GGUF file, for llama.cpp. Nothing is left behind if it fails.

        jlora.gguf.save("lora.gguf", adapter, names, "llama", num_heads=32, num_kv_heads=8)

    llama.cpp divides one alpha by each module's rank. A module that needs another alpha has the ratio in B. A method of
    low rank that is not LoRA is written as the exact equal LoRA.

    Arguments:
        path: of the file; it must not exist.
        adapter: the adapter.
        names: as for `load`.
        architecture: llama.cpp's name for the model, such as "llama" or "qwen3", which must be that of the base's file.
        params: the base parameters, for methods that depend on them.
        num_heads, num_kv_heads, permute: as for `load`.

    Returns:
        a sentence for each update that was written in another form.

    Raises:
        FileExistsError: if the file exists.
        ValueError: if llama.cpp has no equal, with the path and what to do.
        ModuleNotFoundError: as for `load`.
    """
    file = absolute(path)
    if file.exists():
        raise FileExistsError(f"{file} exists. Save to another path, or remove it first.")
    single = {path: with_static_scale(path, update) for path, update in untie(as_single(adapter)).items()}
    content = file_of(single, names, params, architecture, Heads(num_heads, num_kv_heads, permute))
    unfinished = file.with_name(f"{file.name}.part-{os.getpid()}")
    try:
        unfinished.write_bytes(container.pack(content.fields, content.tensors))
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return content.notes
