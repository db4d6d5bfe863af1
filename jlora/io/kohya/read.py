"""From the tensors of kohya, LyCORIS and diffusers to an adapter."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._trace.sites import Sites
from jlora.io.kohya import kronecker
from jlora.io.kohya.content import ModuleContent
from jlora.io.kohya.forms import contents
from jlora.io.kohya.keys import ByKey, by_module, names_by_key
from jlora.io.peft.config import Config, check_config, check_start
from jlora.io.peft.deltas import BaseParams, to_delta
from jlora.io.peft.infer.result import for_weights
from jlora.io.peft.layouts import axis_groups
from jlora.io.peft.method_fields import method_of
from jlora.io.peft.tensors import from_file, sizes_of
from jlora.io.torch.collected import add_module, check_updates, new_collection, update_of
from jlora.io.torch.factor_layout import ModuleFactors, flat_axes, own_sizes
from jlora.io.torch.module_names import Names, no_match_error
from jlora.io.torch.weight_location import ModuleOwner, Owners, Weight, locate_weights, owners_of
from jlora.methods import DoRA, Full, LoKr, LoRA
from jlora.methods._base import Adapter

METADATA = "lora_adapter_metadata"  # of a safetensors file: diffusers' configurations, as JSON
_KINDS = ("linear", "conv")


def read_adapter(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], sites: Sites, names: Names, params: Any
) -> Adapter:
    """The adapter that the tensors of a file describe.

    Arguments:
        tensors: by their keys.
        metadata: of the file.
        sites: of the program.
        names: the map.
        params: the base parameters, or None.

    Raises:
        ValueError: if the file and the program do not fit.
    """
    base = BaseParams(params)
    weights = {path: Weight(site.shape, site.roles) for path, site in sites.items()}
    names = for_weights(names, weights)
    locations = locate_weights(names, weights)
    owners = owners_of(locations)
    modules, unknown = by_module(tensors)
    if unknown:
        raise ValueError(f"The file has tensors that jlora does not know: {', '.join(unknown[:5])}.")
    modules = _by_name(modules, owners, names, sites)
    configs, collected = configurations(metadata), new_collection()
    for name, by_kind in modules.items():
        for target, factors in _factors(name, by_kind, owners, configs).items():
            add_module(collected, target, factors, owners)
    adapter = {path: update_of(by_index, locations[path], True) for path, by_index in collected.items()}
    check_updates(adapter, sites)
    for path, update in adapter.items():
        if isinstance(update.method, DoRA):
            adapter[path] = to_delta(path, update, base)
    arrays = jax.device_put({path: adapter[path].factors for path in sites if path in adapter})
    return {path: dataclasses.replace(adapter[path], factors=factors) for path, factors in arrays.items()}


def _by_name(modules: ByKey, owners: Owners, names: Names, sites: Sites) -> ByKey:
    """The tensors by the names of their modules in torch.

    Raises:
        ValueError: if a key is no spelling of a name, or a module has two keys.
    """
    are_modules = {name: weights[0].location.module.kind != "parameter" for name, weights in owners.items()}
    bare = [name if is_module else name.rpartition(".")[0] for name, is_module in are_modules.items()]
    by_key = names_by_key(dict.fromkeys(bare))
    unplaced = {key: by_key for key in modules if key not in by_key}
    if unplaced:
        raise no_match_error("These in the file have no weight in the program:", unplaced, names, sites)
    by_name: ByKey = {}
    for key, by_kind in modules.items():
        if by_key[key] in by_name:
            raise ValueError(f"The file has {by_key[key]} twice, the second time as {key}.")
        by_name[by_key[key]] = by_kind
    return by_name


def _factors(
    name: str, by_kind: Mapping[str, np.ndarray], owners: Owners, configs: Mapping[str, Config]
) -> dict[str, ModuleFactors]:
    """The factors of a module's weight and of its parameters, by what they belong to."""
    try:
        content, parameters = contents(by_kind)
        if content is not None and "alpha" not in by_kind:
            content = with_configuration(content, name, configs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    targets = {} if content is None else {name: _weight(name, content, owners)}
    for parameter, difference in parameters.items():
        targets[f"{name}.{parameter}"] = _parameter(f"{name}.{parameter}", difference, owners)
    return targets


def _weight(name: str, content: ModuleContent, owners: Owners) -> ModuleFactors:
    location = _owners(name, owners)[0].location
    if location.module.kind not in _KINDS or not location.is_matrix:
        raise ValueError(
            f"The file adapts {name}, and the names have it as {location.path} {location.weight.shape}, "
            f"{location.module.kind}: such files hold linear layers and convolutions."
        )
    if isinstance(content.method, LoKr):
        try:
            content = kronecker.fit(content, location)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    method, axes = content.method, flat_axes(content.method, location)
    for factor, row in content.layout.items():
        stored = {axis for group in axis_groups(row.axes) for axis in group} - {"1", "1..."}
        if factor not in axes or not stored <= {*axes[factor], "kernel"}:
            raise ValueError(f"{name}, {type(method).__name__}, does not fit {location.path} {location.weight.shape}.")
    sizes = sizes_of(owners[name]).with_axes(own_sizes(method, location))
    arrays = {
        factor: from_file(content.arrays[factor], axes[factor], row.axes, sizes, f"{name}.{row.suffix}")
        for factor, row in content.layout.items()
    }
    return ModuleFactors(method, content.scale, arrays, axes)


def _parameter(name: str, difference: np.ndarray, owners: Owners) -> ModuleFactors:
    """The difference of a bias or of a parameter of a norm."""
    weights = _owners(name, owners)
    location = weights[0].location
    if location.module.kind != "parameter":
        raise ValueError(f"The file trains {name}: give it the name Module({name!r}, 'parameter').")
    axes = flat_axes(Full(), location)
    return ModuleFactors(Full(), 1.0, {"d": from_file(difference, axes["d"], "out", sizes_of(weights), name)}, axes)


def _owners(name: str, owners: Owners) -> list[ModuleOwner]:
    if name not in owners:
        raise ValueError(f"The file has a difference for {name}, and no path of the program has that name: add it.")
    return owners[name]


def configurations(metadata: Mapping[str, str]) -> dict[str, Config]:
    """The configurations of PEFT that diffusers keeps in a file, by component; empty if the file has no configuration.

    Raises:
        ValueError: if they are damaged.
    """
    if METADATA not in metadata:
        return {}
    try:
        fields = json.loads(metadata[METADATA])
        configs: dict[str, Config] = {}
        for key, value in fields.items():
            component, _, field = key.rpartition(".")
            configs.setdefault(component, {})[field] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"The file's {METADATA} cannot be read: {error}") from error
    return configs


def with_configuration(content: ModuleContent, name: str, configs: Mapping[str, Config]) -> ModuleContent:
    """The content with the scale of diffusers' configuration, if the file has one for the module.

    Raises:
        ValueError: if the configuration has another rank than the tensors, or another method.
    """
    component = max((c for c in configs if not c or name.startswith(f"{c}.")), key=len, default=None)
    if component is None or not isinstance(content.method, (LoRA, DoRA)):
        return content
    rank = content.method.rank
    defaults = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": None}
    config = check_config(f"the file's {METADATA}", defaults | configs[component])
    check_start(f"the file's {METADATA}", config)
    if config.get("lora_bias"):
        raise ValueError(
            f"the file's {METADATA} has lora_bias = True, and jlora reads such biases in PEFT's files alone."
        )
    method = method_of(config, re.sub(r"^.*?\.", "", name) if component else name)
    is_alike = config["peft_type"] == "LORA" and type(method) is type(content.method)
    if not is_alike or getattr(method, "rank", None) != rank:
        raise ValueError(f"its tensors are {content.method!r}, and the file's {METADATA} has {method!r}.")
    return content._replace(method=method)
