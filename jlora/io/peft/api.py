"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import os
from pathlib import Path
from typing import Any

from jlora._trace.sites import Sites
from jlora.io.peft import config as _peft_config
from jlora.io.peft import read as _peft_read
from jlora.io.peft import tensors as _peft_tensors
from jlora.io.peft import write as _peft_write
from jlora.io.torch.module_names import Module as Module
from jlora.io.torch.module_names import Names as Names
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def load(folder: str | os.PathLike[str], sites: Sites, names: Names, *, params: Any = None) -> Adapter:
    """Reads an adapter that PEFT wrote, or `save`.

    What its configuration says and jlora does not implement is refused, and so is a tensor that is missing, left
    over, or of another shape. VeRA with random matrices other than those that jlora draws from the seed becomes the
    equal LoRA. So do LoRAs of several ranks or scales in one stack, that of the largest rank, with zeros in A and in B
    that no gradient reaches. Where PEFT adapts one use of a tied weight and jlora all, it is refused.

    Arguments:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        sites: from `jlora.trace`, of the program that is to be adapted.
        names: patterns of paths with the names of torch modules (`Module` where they are no plain linear layers; a
            sequence of names where several modules lie side by side in one weight). `{i}` is a whole number.
        params: the base parameters, for what PEFT stores whole and jlora as a difference: DoRA's magnitudes, biases,
            `modules_to_save`, trained tokens, a base embedding in the file, and biases that IA3 scales.

    Returns:
        the adapter, its arrays in the file's dtype, differences in float32.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: for all else, with what was found and what to do.
    """
    config = _peft_config.read(Path(folder) / CONFIG)
    return _peft_read.adapter(config, _peft_tensors.load_file(Path(folder) / TENSORS), sites, names, params)


def save(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    names: Names,
    *,
    params: Any = None,
    target: str | None = None,
) -> tuple[str, ...]:
    """Writes an adapter as PEFT reads it, to a new folder, whole or not at all.

    A method that PEFT lacks, a compensated start, and methods that do not go together are written as the exact equal
    LoRA (`jlora.to_lora`). `Full` is written as trained tokens (embeddings), `bias`, or `modules_to_save`.
    Which factors are frozen, and the dropout of LoHa and LoKr, have no place in the files and are left out.

    Arguments:
        folder: to write, which must not exist.
        adapter: the adapter.
        names: as for `load`.
        params: the base parameters, as for `load`.
        target: "vllm" for a serving engine that takes plain LoRA of one rank and one scale alone.

    Returns:
        a sentence for each thing that was written in another form than the adapter has it.

    Raises:
        FileExistsError: where the folder exists.
        ValueError: where PEFT has no equal, with the path and what to do.
    """
    path = Path(os.path.abspath(folder))
    if path.exists():
        raise FileExistsError(f"{path} exists. Save to another path, or remove it first.")
    config, tensors, said = _peft_write.files(as_single(adapter), names, params, target)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.mkdir(parents=True)
    try:
        _peft_tensors.save_file(part / TENSORS, tensors)
        _peft_config.write(part / CONFIG, config)
        part.rename(path)
    finally:
        for file in part.glob("*"):
            file.unlink()
        if part.exists():
            part.rmdir()
    return said
