"""Adapters in the files of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

import os

from jlora._trace.sites import Sites
from jlora._tree.paths import Tree
from jlora.io.file_paths import absolute
from jlora.io.peft.config import TASK_TYPES, read_config, write_config
from jlora.io.peft.folders import CONFIG, TENSORS, file_in
from jlora.io.peft.forms import has_integers
from jlora.io.peft.read import read_adapter
from jlora.io.peft.safetensors_file import load_tensors, save_tensors
from jlora.io.peft.write import peft_files
from jlora.io.torch.module_names import Module as Module
from jlora.io.torch.module_names import Names as Names
from jlora.io.torch.module_names import check_inputs
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single, with_static_scale
from jlora.methods._sharing import untie


def load(
    folder: str | os.PathLike[str],
    sites: Sites,
    names: Names,
    *,
    params: Tree = None,
    start: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Reads an adapter from a folder that PEFT or `jlora.peft.save` wrote.

        sites = jlora.trace(model.apply, variables, tokens)
        names = {"params/layers/{i}/query/kernel": "model.layers.{i}.self_attn.q_proj"}
        adapter = jlora.peft.load("adapter", sites, names)

    Everything in the file is read or refused: a field of its configuration that jlora does not implement, a tensor that
    is missing, left over or of another shape, and an adapter for one use of a weight that the program uses twice. VeRA
    with other random matrices than those that jlora draws from the seed becomes the equal LoRA. LoRAs of several ranks
    or scales in one stacked weight become one of the largest rank, with zeros in A and in B that no gradient reaches.
    What PEFT has in another form becomes the equal plain one: AdaLoRA a LoRA of the ranks that are left, a bias of B a
    `Full` of the module's bias, and PiSSA and OLoRA a LoRA of twice the rank, relative to the base in `params`.

    Arguments:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        sites: from `jlora.trace`, of the program that is to be adapted.
        names: patterns of paths, each with the name of a torch module. An index absent from the path enumerates the
            stacked axis. A list of names denotes modules concatenated along the out axis. Use `Module(...)` for
            anything but a linear layer.
        params: the base parameters. Needed for what PEFT stores absolutely and jlora as a difference: DoRA's
            magnitudes, biases, `modules_to_save`, trained tokens, a base embedding in the file, and biases that IA3
            scales; and for PiSSA and OLoRA, whose files are relative to a base that they have changed.
        start: the folder of the adapter before training, for a file that is relative to a base that its start has
            changed in a way that `params` does not determine: CorDA, LoRA-GA, PiSSA by iterations. It is what PEFT
            calls `path_initial_model_for_weight_conversion`. The update is a LoRA of twice the rank.

    Returns:
        the adapter. Its arrays have the dtypes of the file; differences are float32.

    Raises:
        FileNotFoundError: if a file is missing; the message states what the folder has instead.
        TypeError: if `sites` is not from `jlora.trace`, or `names` is not a dict.
        ValueError: if the file is damaged, or does not fit the program; the message states what to do.
    """
    check_inputs(sites, names)
    folder = absolute(folder)
    config = read_config(file_in(folder, CONFIG), has_start=start is not None)
    before = None if start is None else load_tensors(file_in(absolute(start), TENSORS))
    tensors = load_tensors(file_in(folder, TENSORS), integers=has_integers(config))
    return read_adapter(config, tensors, sites, names, params, before)


def save(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    names: Names,
    *,
    params: Tree = None,
    target: str | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> tuple[str, ...]:
    """Writes an adapter to a new folder as PEFT reads it. Nothing is left behind if it fails.

        names = {"params/layers/{i}/query/kernel": "model.layers.{i}.self_attn.q_proj"}
        for change in jlora.peft.save("adapter", adapter, names):
            print(change)

    A method that PEFT lacks, an update with `offset`, and methods that PEFT cannot combine are written as the exact
    equal LoRA (`jlora.to_lora`). `Full` becomes trained tokens (of embeddings), `bias`, or `modules_to_save`. The files
    do not record which factors are frozen, nor the dropout of LoHa and LoKr.

    Arguments:
        folder: to write; it must not exist.
        adapter: the adapter.
        names: as for `load`.
        params: the base parameters, as for `load`.
        target: "vllm" for a serving engine that takes plain LoRA of one rank and one scale.
        base_model: the name or the folder of the base model, for readers that load it by themselves, as
            `AutoPeftModelForCausalLM` does.
        task_type: what PEFT is told that the model does, "CAUSAL_LM" for example. PEFT adds methods such as `generate`
            by it.

    Returns:
        a sentence for each update that was written in another form.

    Raises:
        FileExistsError: if the folder exists.
        ValueError: if PEFT has no equal, with the path and what to do; or if it has no such task type.
    """
    if task_type not in (None, *TASK_TYPES):
        raise ValueError(f"PEFT has no task_type {task_type!r}; it has {', '.join(TASK_TYPES)}.")
    path = absolute(folder)
    if path.exists():
        raise FileExistsError(f"{path} exists. Save to another path, or remove it first.")
    adapter = {path: with_static_scale(path, update) for path, update in untie(as_single(adapter)).items()}
    files = peft_files(adapter, names, params, target)
    unfinished = path.with_name(f"{path.name}.part-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        save_tensors(unfinished / TENSORS, files.tensors)
        write_config(
            unfinished / CONFIG, files.config | {"base_model_name_or_path": base_model, "task_type": task_type}
        )
        unfinished.rename(path)
    finally:
        for file in unfinished.glob("*"):
            file.unlink()
        if unfinished.exists():
            unfinished.rmdir()
    return files.notes
