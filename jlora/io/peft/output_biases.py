"""The trained biases of B (`lora_bias`): updates of the modules' own biases."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from jlora._trace.sites import Sites
from jlora.io.peft.full_weights import read_full
from jlora.io.peft.method_fields import method_of
from jlora.io.peft.read_module import ModuleReader
from jlora.io.peft.targets import is_target
from jlora.io.torch.collected import add_module, check_updates, new_collection, update_of
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.module_names import Names, bias_hint
from jlora.io.torch.weight_location import Index, WeightLocation
from jlora.methods import LoRA
from jlora.methods._base import Adapter


def with_output_biases(
    adapter: Adapter,
    adapted: Iterable[str],
    biases: Mapping[str, np.ndarray],
    reader: ModuleReader,
    sites: Sites,
    names: Names,
) -> Adapter:
    """The adapter with what the biases of B add: `s A B + s beta` is `s beta` more in the module's bias.

    Arguments:
        adapter: the adapter without them.
        adapted: the adapted modules.
        biases: of B, by module.
        reader: of the file.
        sites: of the program.
        names: the map, for errors.

    Raises:
        ValueError: if a module has no bias in the map, or its bias does not fit.
    """
    _check_complete(adapted, biases, reader)
    if not biases:
        return adapter
    collected, owners, locations = new_collection(), reader.owners, {}
    for module, tensor in biases.items():
        bias = f"{module}.bias"
        if bias not in owners:
            raise ValueError(_no_bias(module, names, owners[module][0].location.path))
        scale = 1.0
        if reader.config["peft_type"] not in ("BEFT", "GLORA"):
            method = method_of(reader.config, module)
            assert isinstance(method, LoRA)  # PEFT has no such biases for another method
            scale = method.scale
        value = tensor.astype(np.promote_types(tensor.dtype, np.float32)) * np.float32(scale)
        add_module(collected, bias, read_full(bias, value, owners[bias]), owners)
        locations |= {owner.location.path: owner.location for owner in owners[bias]}
    for path, location in locations.items():
        _fill_with_zeros(collected[path], location)
    updates = {path: update_of(by_index, locations[path], False) for path, by_index in collected.items()}
    check_updates(updates, sites)
    for path, update in updates.items():
        if path in adapter:  # trained by itself too
            both = np.asarray(adapter[path].factors["d"]) + update.factors["d"]
            updates[path] = dataclasses.replace(update, factors={"d": both})
    return {**adapter, **updates}


def _check_complete(adapted: Iterable[str], biases: Mapping[str, np.ndarray], reader: ModuleReader) -> None:
    """Raises unless the file has the biases of B that the configuration names: all of them or none."""
    if reader.config["peft_type"] == "BEFT":
        targets = {name for name in reader.owners if is_target(reader.config, name) and not name.endswith(".bias")}
        if targets != set(biases):
            raise ValueError(f"The configuration of BEFT names {sorted(targets)}, and the file has {sorted(biases)}.")
        return
    if reader.config["peft_type"] == "GLORA":
        return
    has_biases = reader.config["peft_type"] == "LORA" and bool(reader.config.get("lora_bias"))
    missing = sorted(set(adapted) - set(biases)) if has_biases else []
    if missing:
        raise ValueError(f"The configuration has lora_bias = True, and the file lacks the biases of B for {missing}.")
    if biases and not has_biases:
        raise ValueError(f"The file has biases of B for {sorted(biases)}, and the configuration has no lora_bias.")


def _fill_with_zeros(by_index: dict[Index, dict[int, ModuleFactors]], location: WeightLocation) -> None:
    """Adds a difference of zero for every module of a bias whose file has no difference for it."""
    one = next(iter(next(iter(by_index.values())).values()))
    sizes = location.out_sizes if location.num_joined > 1 else (location.count("out"),)
    for index in location.modules:
        for position, size in enumerate(sizes):
            zeros = dataclasses.replace(one, arrays={"d": np.zeros(size, one.arrays["d"].dtype)})
            by_index.setdefault(index, {}).setdefault(position, zeros)


def _no_bias(module: str, names: Names, path: str) -> str:
    """The error for a module whose bias the map does not have."""
    written = bias_hint(f"{path.rpartition('/')[0]}/bias", names)
    return (
        f"The file changes the bias of {module} (by lora_bias, or GLoRA's C, D and E), and names have none beside "
        f"{path}. If the program has one, add it: {written}. If not, give the program a bias of zeros there, or train "
        "without these."
    )
