"""Adapters in the files of kohya's scripts, of LyCORIS and of diffusers: one safetensors file."""

import os
import re

from jlora._trace.sites import Sites
from jlora._tree.paths import Tree
from jlora.io.file_paths import absolute
from jlora.io.kohya.keys import Form
from jlora.io.kohya.read import read_adapter
from jlora.io.kohya.write import file_of
from jlora.io.peft.safetensors_file import load_metadata, load_tensors, save_tensors
from jlora.io.torch.module_names import Module as Module
from jlora.io.torch.module_names import Names as Names
from jlora.io.torch.module_names import check_inputs
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single, with_static_scale
from jlora.methods._sharing import untie


def load(
    path: str | os.PathLike[str], sites: Sites, names: Names, *, params: Tree = None, ignore: str | None = None
) -> Adapter:
    """Reads an adapter for a diffusion model: a file of kohya's scripts, of LyCORIS or of diffusers.

        names = {"down_blocks_{i}/attentions_{j}/to_q/kernel": "unet.down_blocks.{i}.attentions.{j}.to_q"}
        adapter = jlora.kohya.load("lora.safetensors", sites, names, ignore="lora_te.*")

    A name starts with the component that the module belongs to: "unet.", "transformer.", "text_encoder.",
    "text_encoder_2." or "text_encoder_3.". Without one it is a module of a single model, as LyCORIS has it with the
    prefix "lycoris". The keys of kohya are the names with underscores for dots, and are found by spelling the names so.

    LoRA, LoRA with a Tucker core (`LoCon`), DoRA, LoHa, LoKr and differences in full are read, each with its own alpha.
    Everything in the file is read, ignored on request, or refused.

    Arguments:
        path: the file.
        sites: from `jlora.trace`, of the program that is to be adapted.
        names: as for `jlora.peft.load`. A bias or a parameter of a norm is a `Module(..., "parameter")`.
        params: the base parameters. Needed for DoRA, whose magnitudes the file stores absolutely.
        ignore: a regular expression for keys to leave out, matched from their start.

    Returns:
        the adapter. Its arrays have the dtypes of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds a form that jlora does not read, or does not fit the program; the
            message states what to do.
    """
    check_inputs(sites, names)
    path = absolute(path)
    tensors = load_tensors(path, integers=True)  # alpha may be one
    kept = {key: tensor for key, tensor in tensors.items() if ignore is None or not re.match(ignore, key)}
    if not kept:
        raise ValueError(f"{path} has no tensor{'' if ignore is None else f' that {ignore!r} does not ignore'}.")
    return read_adapter(kept, load_metadata(path), sites, names, params)


def save(
    path: str | os.PathLike[str], adapter: Adapter, names: Names, *, params: Tree = None, form: Form = "kohya"
) -> tuple[str, ...]:
    """Writes an adapter for a diffusion model to a new safetensors file. Nothing is left behind if it fails.

        jlora.kohya.save("lora.safetensors", adapter, names)
        jlora.kohya.save("for_diffusers.safetensors", adapter, names, form="diffusers")

    A method that the form lacks, and an update with `offset`, is written as the exact equal LoRA (`jlora.to_lora`).

    Arguments:
        path: of the file; it must not exist.
        adapter: the adapter.
        names: as for `load`.
        params: the base parameters, as for `load`.
        form: "kohya" for kohya's scripts, LyCORIS and the programs that read their files: LoRA, DoRA, LoCon, LoHa, LoKr
            and Full. "diffusers" for LoRA and DoRA in the keys of diffusers and PEFT, which have no alpha: the scale is
            multiplied into B.

    Returns:
        a sentence for each update that was written in another form.

    Raises:
        FileExistsError: if the file exists.
        ValueError: if the form has no equal, with the name and what to do.
    """
    file = absolute(path)
    if file.exists():
        raise FileExistsError(f"{file} exists. Save to another path, or remove it first.")
    single = {path: with_static_scale(path, update) for path, update in untie(as_single(adapter)).items()}
    content = file_of(single, names, params, form)
    unfinished = file.with_name(f"{file.name}.part-{os.getpid()}")
    try:
        save_tensors(unfinished, content.tensors)
        unfinished.rename(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return content.notes
