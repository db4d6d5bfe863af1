"""From PEFT's tensors and configuration to an adapter."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jlora._trace.sites import Sites
from jlora.io.peft import plain_forms
from jlora.io.peft.attention import check_attention
from jlora.io.peft.completeness import check_complete
from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.deltas import BaseParams, scaled_bias, scaled_biases, to_delta
from jlora.io.peft.forms import is_shared_name, one_tensor_each
from jlora.io.peft.frod import together
from jlora.io.peft.full_weights import check_stored_base, is_unused_copy, read_full, read_token_rows, untrained
from jlora.io.peft.glora import BIAS_SUFFIXES, bias_changes
from jlora.io.peft.infer.result import for_weights, unnamed_weights
from jlora.io.peft.layouts import SUFFIXES
from jlora.io.peft.output_biases import with_output_biases
from jlora.io.peft.pvera import MATRICES
from jlora.io.peft.read_module import ModuleReader
from jlora.io.peft.targets import is_target_parameter
from jlora.io.peft.tensors import Tensors, sizes_of
from jlora.io.peft.tied import tied_heads, tied_modules, without_tied_heads
from jlora.io.peft.vera import PROJECTIONS, drawn_projections
from jlora.io.torch.collected import Collected, add_module, check_updates, new_collection, update_of
from jlora.io.torch.module_names import Names, no_match_error
from jlora.io.torch.weight_location import Owners, Weight, WeightLocation, locate_weights, owners_of
from jlora.methods._base import Adapter, Update
from jlora.methods._sharing import tie

_BIAS = "lora_B.bias"
_OF_MODULES = (*SUFFIXES, *plain_forms.SUFFIXES, *BIAS_SUFFIXES)
_OF_TRAINING = ".lora_velora_embed"  # what VeLoRA compresses activations with
# The random matrices of a type that a file may leave out, and a vector that tells the out size of a module.
_DRAWN = {"VERA": (PROJECTIONS, "vera_lambda_b"), "PVERA": (MATRICES, "pvera_lambda_b")}
_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


class FileContent(NamedTuple):
    """The tensors of a file by module or parameter.

    Arguments:
        adapters: for every adapted module its tensors by suffix.
        biases: of every module that has one, the trained bias of B (`lora_bias`).
        trained: parameters that are trained in full: biases and `modules_to_save`.
        bases: base weights of adapted modules, which PEFT may store beside them.
        tokens: trained rows of embeddings.
    """

    adapters: dict[str, Tensors]
    biases: Tensors
    trained: Tensors
    bases: Tensors
    tokens: Tensors


def read_adapter(
    config: Config, tensors: Tensors, sites: Sites, names: Names, params: Any, start: Tensors | None = None
) -> Adapter:
    """The adapter that a configuration and its tensors describe.

    Arguments:
        config: the configuration.
        tensors: by their names in the file.
        sites: of the program.
        names: the map.
        params: the base parameters, or None.
        start: the tensors before training, if the adapter is relative to a base that its start changed.

    Raises:
        ValueError: if the file and the program do not fit.
    """
    base = BaseParams(params)
    config, tensors = one_tensor_each(config, tensors)
    weights = {path: Weight(site.shape, site.roles) for path, site in sites.items()}
    inferred, names = names, for_weights(names, weights)
    locations = locate_weights(names, weights, assume_experts=True)
    sites = sites.with_roles(
        {re.escape(path): at.weight.roles for path, at in locations.items() if at.weight.roles != weights[path].roles}
    )
    owners = owners_of(locations)
    content = _group_tensors(tensors, owners, config)
    if config["peft_type"] == "GLORA":
        adapters, changes = bias_changes(content.adapters, content.trained, owners, base)
        content = content._replace(adapters=adapters, biases=changes)
    changed = [name for name, by_suffix in content.adapters.items() if not _is_without_effect(by_suffix)]
    check_attention(changed, owners)
    heads = tied_heads(content.adapters, locations, sites, config)
    embeddings = tied_modules(locations, sites)
    saved_heads = {embeddings[name] for name in content.trained if name in embeddings}
    content = content._replace(
        trained=without_tied_heads(content.trained, embeddings, config),
        tokens=without_tied_heads(content.tokens, embeddings, config),
    )
    unplaced = {name: owners for part in content for name in part if name not in owners and name not in heads}
    if unplaced:
        hints = unnamed_weights(inferred, unplaced)
        raise no_match_error("These in the file have no weight in the program:", unplaced, names, sites, hints)
    check_complete(config, set(content.adapters) - heads, set(content.trained), set(content.tokens), owners)
    reader = ModuleReader(config, owners, _with_drawn_projections(config, content, owners, tensors), base)
    before = None if start is None else _group_tensors(start, owners, config).adapters
    collected = _collect(reader, content, before, heads, saved_heads, sites)
    # The configuration has named every layer that has an adapter, unless it leaves that to torch's classes.
    are_named = config["target_modules"] != "all-linear"
    adapter = {path: update_of(by_index, locations[path], are_named) for path, by_index in collected.items()}
    check_updates(adapter, sites)
    adapter = {path: to_delta(path, together(update), base) for path, update in adapter.items()}
    adapter = with_output_biases(adapter, content.adapters, content.biases, reader, sites, names)
    adapter |= _implied_biases(adapter, sites, locations, base, names)
    factors = jax.device_put({path: adapter[path].factors for path in sites if path in adapter})
    return tie({path: _with_frozen(adapter[path], arrays) for path, arrays in factors.items()})


def _is_without_effect(by_suffix: Tensors) -> bool:
    """Whether a module's LoRA is that of the start: what PEFT saves of a module that its forward pass passes over."""
    return "lora_B.weight" in by_suffix and not by_suffix["lora_B.weight"].any()


def _with_frozen(update: Update, arrays: dict[str, Any]) -> Update:
    """The update with these arrays, divided into those that train and the others."""
    names = update.method.frozen
    frozen = {name: array for name, array in arrays.items() if name in names}
    factors = {name: array for name, array in arrays.items() if name not in names}
    return dataclasses.replace(update, factors=factors, frozen=frozen)


def _implied_biases(
    adapter: Adapter, sites: Sites, locations: Mapping[str, WeightLocation], base: BaseParams, names: Names
) -> Adapter:
    """Updates for the biases that PEFT's IA3 scales with their weights."""
    biases = {}
    for path, bias in scaled_biases(adapter, sites, locations, names).items():
        if bias in adapter:
            raise ValueError(f"The file trains the bias {bias} and scales it by IA3; jlora does one of the two.")
        biases[bias] = scaled_bias(path, adapter[path], bias, base)
    return biases


def _with_drawn_projections(config: Config, content: FileContent, owners: Owners, tensors: Tensors) -> Tensors:
    """The tensors of a file with the random matrices of VeRA or PVeRA that it leaves out."""
    if config["peft_type"] not in _DRAWN or config.get("save_projection", True):
        return tensors
    names, suffix = _DRAWN[config["peft_type"]]
    surplus = [name for name in names if name in tensors]
    if surplus:
        raise ValueError(f"The file has {', '.join(surplus)}, and save_projection = False: set it to true.")
    ins = [sizes_of(owners[name]).axes["in"] for name in content.adapters]
    outs = [len(by_suffix[suffix]) for by_suffix in content.adapters.values() if suffix in by_suffix]
    return tensors | drawn_projections(config, names, max(ins, default=1), max(outs, default=1))


def _group_tensors(tensors: Tensors, owners: Owners, config: Config) -> FileContent:
    """The tensors by what they are, by the suffixes of their names."""
    content = FileContent(collections.defaultdict(dict), {}, {}, {}, {})
    for key, tensor in tensors.items():
        if key in (*PROJECTIONS, *MATRICES) or is_shared_name(key) or key.endswith(_OF_TRAINING):
            continue
        if is_unused_copy(key, tensors):
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"The file has the tensor {key}, and all of PEFT's start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        suffix = next(
            (suffix for suffix in (*_OF_MODULES, _BIAS, *_TOKENS) if name.endswith(f".{suffix}")),
            "",
        )
        module = name.removesuffix(f".{suffix}")
        if suffix in _TOKENS:
            content.tokens[module] = tensor
        elif suffix == _BIAS:
            content.biases[module] = tensor
        elif suffix:
            content.adapters[_wrapped_parameter(module, owners, config)][suffix] = tensor
        elif name.endswith(".base_layer.weight"):
            content.bases[name.removesuffix(".base_layer.weight")] = tensor
        else:
            name = name.replace(".base_layer.", ".")
            content.trained[name if name in owners else name.removesuffix(".weight")] = tensor
    return content


def _wrapped_parameter(module: str, owners: Owners, config: Config) -> str:
    """The parameter that tensors belong to: PEFT wraps a module once for each parameter, the first one innermost."""
    if not config.get("target_parameters"):
        return module
    bare = re.sub(r"(\.base_layer)+$", "", module)
    parameters = [name for name in owners if name.rpartition(".")[0] == bare and is_target_parameter(config, name)]
    depth = module.removeprefix(bare).count(".base_layer")
    return parameters[-1 - depth] if depth < len(parameters) else module


def _untrained_layers(location: WeightLocation, collected: Collected) -> list[str]:
    """The modules of a stacked bias that the file does not train: no product uses it, so it has no axis of layers."""
    if location.module.part is not None or "stack" in location.weight.roles:
        return []
    layers = collected[location.path]
    return [
        name
        for index, names in location.modules.items()
        for position, name in enumerate(names)
        if position not in layers.get(index, {})
    ]


def _collect(
    reader: ModuleReader,
    content: FileContent,
    before: Mapping[str, Tensors] | None,
    heads: set[str],
    saved_heads: set[str],
    sites: Sites,
) -> Collected:
    """The factors of every module in the file, by the weights that they belong to.

    Arguments:
        reader: of the file.
        content: of the file.
        before: the tensors of every adapted module before training, or None.
        heads: the tied output heads, which are read as embeddings.
        saved_heads: the embeddings that are trained in full together with their heads.
        sites: of the program.
    """
    collected, owners, config, base = new_collection(), reader.owners, reader.config, reader.base
    for name, by_suffix in content.adapters.items():
        if name not in heads:
            factors = reader.read(name, by_suffix, None if before is None else before.get(name, {}))
            if factors is not None:
                add_module(collected, name, factors, owners)
    for name, tensor in content.trained.items():
        site = sites[owners[name][0].location.path]
        if site.is_lookup and site.is_product and name not in saved_heads:
            raise ValueError(
                f"{site.path} is an embedding and the output head at once, and the file trains {name} alone: untie "
                "them in the program."
            )
        add_module(collected, name, read_full(name, tensor, owners[name]), owners)
    for location in [owners[name][0].location for name in content.trained]:
        for name in _untrained_layers(location, collected):
            add_module(collected, name, untrained(name, owners[name], base), owners)
    for name, tensor in content.tokens.items():
        add_module(collected, name, read_token_rows(name, tensor, config, owners[name], base), owners)
    for name, tensor in content.bases.items():
        if name not in heads:
            check_stored_base(name, tensor, owners[name], base)
    return collected
