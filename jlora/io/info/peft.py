"""What a file of PEFT holds."""

import collections
import json
import re
from collections.abc import Mapping
from pathlib import Path

from jlora._adapter.summary import UpdateSummary
from jlora.io.info.modules import FileFactors, fits, summarize
from jlora.io.info.report import Content
from jlora.io.peft import maps, plain_forms, products, structured
from jlora.io.peft.absent import WHOLE_MODULES
from jlora.io.peft.changed_base import FROM_BASE
from jlora.io.peft.config import PREFIX, Config, read_config
from jlora.io.peft.folders import CONFIG, TENSORS, file_in
from jlora.io.peft.form_methods import osf_of_file
from jlora.io.peft.forms import has_integers, is_shared_name, one_tensor_each
from jlora.io.peft.full_weights import is_unused_copy
from jlora.io.peft.glora import BIAS_SUFFIXES
from jlora.io.peft.layouts import ADAPTERS, SUFFIXES, Layout
from jlora.io.peft.maps import is_map, method_and_tensors
from jlora.io.peft.method_fields import method_of
from jlora.io.peft.pvera import MATRICES
from jlora.io.peft.safetensors_file import load_tensors
from jlora.io.peft.stated_sizes import check_stated_sizes
from jlora.io.peft.tensors import Tensors
from jlora.io.peft.vera import PROJECTIONS
from jlora.methods import IA3, OSF, Full, LoKr
from jlora.methods._base import Method


def read(folder: Path) -> Content:
    """The content of a folder with PEFT's two files.

    Raises:
        FileNotFoundError: if one of the two is missing.
        ValueError: if one of them is damaged.
    """
    refused: list[str] = []
    config = _config(folder / CONFIG, refused)
    integers = config is None or has_integers(config)
    return content(config, load_tensors(file_in(folder, TENSORS), integers=integers), refused)


def _config(path: Path, refused: list[str]) -> Config | None:
    """The configuration; None if jlora refuses it, and then the reason is added to `refused`."""
    with path.open(encoding="utf-8") as file:
        try:
            json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    try:
        return read_config(path)
    except ValueError as error:
        refused.append(str(error))
        return None


def content(config: Config | None, tensors: Tensors, refused: list[str]) -> Content:
    """The content of PEFT's tensors.

    Arguments:
        config: the configuration; None if it is refused, and then the adapted modules are not listed.
        tensors: by their names in the file.
        refused: the reasons that are known already.
    """
    trained, notes = [], []
    if config is not None:
        try:
            config, tensors = one_tensor_each(config, tensors)
        except ValueError as error:
            return Content((), (*refused, str(error)), ())
    adapters: dict[str, Tensors] = collections.defaultdict(dict)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in (*SUFFIXES, *plain_forms.SUFFIXES) if name.endswith(f".{suffix}")), "")
        is_shared = key in (*PROJECTIONS, *MATRICES) or is_shared_name(key)
        if is_shared or is_unused_copy(key, tensors) or name.endswith(".lora_velora_embed"):
            continue
        if note := _about_bias_or_base(name):
            notes.append(note)
        elif name == key:
            refused.append(f"The file has the tensor {key}, and all of PEFT's start with {PREFIX}")
        elif suffix:
            adapters[name.removesuffix(f".{suffix}")][suffix] = tensor
        else:
            notes.append(f"{name} holds values in place of the base's: jlora.peft.load needs params=.")
            trained.append(UpdateSummary(name, Full(), None, tensor.shape, tensor.size, tensor.nbytes, None))
    if config is not None and (start := _start_of_base(config)):
        notes.append(f"init_lora_weights = {start!r}: the update follows from the base, jlora.peft.load needs params=.")
    modules = [] if config is None else [_module(config, name, adapters, refused) for name in adapters]
    updates = [update for update in modules if update is not None]
    return Content((*updates, *trained), tuple(refused), tuple(notes))


def _about_bias_or_base(name: str) -> str:
    """The note on a tensor that is neither a factor nor trained itself, "" for all others."""
    if name.endswith(BIAS_SUFFIXES):
        return f"{name}: jlora.peft.load adds what it does to the bias of the module."
    if name.endswith(".lora_B.bias"):
        return f"{name} is a bias of B: jlora.peft.load adds it to the bias of the module."
    if name.endswith(".base_layer.weight"):
        return f"{name} is a weight of the base: jlora.peft.load compares it with params."
    return ""


def _module(config: Config, name: str, adapters: Mapping[str, Tensors], refused: list[str]) -> UpdateSummary | None:
    """The summary of a module; None if its rank is 0, or it is refused, and then the reason is added to `refused`."""
    try:
        check_stated_sizes(config, name, name, adapters[name], {})
        if is_map(config):
            method, by_suffix = method_and_tensors(config, name, adapters[name], _sides(adapters[name]))
            is_certain = True
        else:
            method, is_certain = _method(config, name, adapters)
            by_suffix = plain_forms.plain(config, name, adapters[name], "linear")
        if isinstance(method, OSF):
            method = osf_of_file(by_suffix)
        if method is None:
            return None
        layout = _layout(method, by_suffix)
        arrays = {factor: by_suffix[row.suffix] for factor, row in layout.items()}
        scale = 1.0
        if isinstance(method, LoKr) and len(arrays) == 2:  # without low rank PEFT has a scale, and jlora has none
            scale = (method.alpha or 0) / (method.rank or 1)
        has_shape = fits(layout, by_suffix, _rank(method))
        has_norm = is_certain and not _start_of_base(config)
        return summarize(name, FileFactors(method, layout, arrays, scale, has_norm, has_shape))
    except ValueError as error:
        refused.append(f"{name}: {error}")
        return None


def _start_of_base(config: Config) -> str:
    """The name of a start that PEFT computes from the base and subtracts from it; "" for all other starts."""
    start = str(config.get("init_lora_weights", True)).lower()
    return start if config["peft_type"] == "LORA" and start in FROM_BASE else ""


def _sides(by_suffix: Tensors) -> dict[str, int]:
    """The sides of the smallest weight of a MiSS, whose in size its tensors do not tell; none for other types."""
    block = by_suffix.get("miss_block")
    return {} if block is None or block.ndim != 2 else {"in": block.shape[0], "out": block.shape[1]}


def _method(config: Config, name: str, adapters: Mapping[str, Tensors]) -> tuple[Method | None, bool]:
    """The method of a module, None if it has no rank left, and whether it is certain.

    Experts are parameters of one module. Which of them a tensor belongs to follows from the model. Here it follows from
    the ranks: A has one row for each rank of each expert.
    """
    bare = _without_wrappers(name)
    parameters = [p for p in config.get("target_parameters") or () if f".{bare}".endswith(f".{p.rpartition('.')[0]}")]
    if not parameters or plain_forms.parameter_of(config, bare) != bare:
        return method_of(config, plain_forms.parameter_of(config, bare)), True
    methods = [method_of(config, f"{bare}.{p.rpartition('.')[2]}") for p in parameters]
    rows = {other: len(t["lora_A.weight"]) for other, t in adapters.items() if _without_wrappers(other) == bare}
    num_experts = sum(rows.values()) / sum(_rank(method) for method in methods)
    possible = {method for method in methods if _rank(method) * num_experts == rows[name]}
    if not possible:
        raise ValueError(f"its tensors fit none of the ranks that the configuration has for {parameters}.")
    return next(iter(possible)), len(possible) == 1


def _without_wrappers(name: str) -> str:
    return re.sub(r"(\.base_layer)+$", "", name)


def _rank(method: Method | None) -> int:
    return getattr(method, "rank", None) or 1


def _layout(method: Method, by_suffix: Tensors) -> Layout:
    """The layout that a module's tensors have.

    Raises:
        ValueError: if the method has no layout with these tensors, or their shapes do not fit it.
    """
    layouts = [layout for layouts in ADAPTERS[type(method)].values() for layout in layouts]
    suffixes = [{row.suffix for row in layout.values()} for layout in layouts]
    alike = [layout for layout, expected in zip(layouts, suffixes, strict=True) if expected == set(by_suffix)]
    for layout in alike:
        if _is_direction(method, layout) and fits(layout, by_suffix, _rank(method)):
            return layout
    if alike and type(method) in (*WHOLE_MODULES, *maps.METHODS, *structured.METHODS, *products.METHODS):
        return alike[0]  # of blocks, places or turns: sizes that a weight determines
    if alike:
        shapes = {suffix: tensor.shape for suffix, tensor in by_suffix.items()}
        raise ValueError(f"its tensors have the shapes {shapes}, which do not fit {method!r}.")
    nearest = min(suffixes, key=lambda expected: len(expected ^ set(by_suffix)))
    raise ValueError(
        f"{type(method).__name__}: missing {sorted(nearest - set(by_suffix))}, left over "
        f"{sorted(set(by_suffix) - nearest)}."
    )


def _is_direction(method: Method, layout: Layout) -> bool:
    """Whether a layout of IA3 has the axis that the method scales."""
    return not isinstance(method, IA3) or ("channels" in layout["l"].axes) == (method.axis == "in")
