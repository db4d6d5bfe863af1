"""From PEFT's tensors and configuration to an adapter."""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jlora._trace.sites import Sites
from jlora.io.peft.completeness import check_complete, tied_heads
from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.deltas import BaseParams, scaled_bias, scaled_biases, to_delta
from jlora.io.peft.full_weights import check_stored_base, read_full, read_token_rows
from jlora.io.peft.infer.result import for_weights, unnamed_weights
from jlora.io.peft.layouts import SUFFIXES, layout_of
from jlora.io.peft.method_fields import is_unscaled, method_of
from jlora.io.peft.targets import is_target_parameter
from jlora.io.peft.tensors import Tensors, from_file, sizes_of
from jlora.io.peft.vera import PROJECTIONS, read_vera
from jlora.io.torch.collected import Collected, add_module, check_updates, new_collection, update_of
from jlora.io.torch.factor_layout import ModuleFactors, flat_axes, own_sizes
from jlora.io.torch.module_names import Names, no_match_error
from jlora.io.torch.weight_location import Owners, Weight, WeightLocation, locate_weights, owners_of
from jlora.methods import LoKr, VeRA
from jlora.methods._base import Adapter

_TOKENS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")


class FileContent(NamedTuple):
    """The tensors of a file by module or parameter.

    Arguments:
        adapters: for every adapted module its tensors by suffix.
        trained: parameters that are trained in full: biases and `modules_to_save`.
        bases: base weights of adapted modules, which PEFT may store beside them.
        tokens: trained rows of embeddings.
    """

    adapters: dict[str, Tensors]
    trained: Tensors
    bases: Tensors
    tokens: Tensors


def read_adapter(config: Config, tensors: Tensors, sites: Sites, names: Names, params: Any) -> Adapter:
    """The adapter that a configuration and its tensors describe.

    Arguments:
        config: the configuration.
        tensors: by their names in the file.
        sites: of the program.
        names: the map.
        params: the base parameters, or None.

    Raises:
        ValueError: if the file and the program do not fit.
    """
    base = BaseParams(params)
    weights = {path: Weight(site.shape, site.roles) for path, site in sites.items()}
    inferred, names = names, for_weights(names, weights)
    locations = locate_weights(names, weights, assume_experts=True)
    sites = sites.with_roles(
        {re.escape(path): at.weight.roles for path, at in locations.items() if at.weight.roles != weights[path].roles}
    )
    owners = owners_of(locations)
    content = _group_tensors(tensors, owners, config)
    heads = tied_heads(content.adapters, locations, sites, config)
    unplaced = {name: owners for part in content for name in part if name not in owners and name not in heads}
    if unplaced:
        hints = unnamed_weights(inferred, unplaced)
        raise no_match_error("These in the file have no weight in the program:", unplaced, names, sites, hints)
    check_complete(config, set(content.adapters) - heads, set(content.trained), set(content.tokens), owners)
    collected = _collect(config, content, owners, heads, tensors, sites, base)
    # The configuration has named every layer that has an adapter, unless it leaves that to torch's classes.
    are_named = config["target_modules"] != "all-linear"
    adapter = {path: update_of(by_index, locations[path], are_named) for path, by_index in collected.items()}
    check_updates(adapter, sites)
    adapter = {path: to_delta(path, update, base) for path, update in adapter.items()}
    adapter |= _implied_biases(adapter, sites, locations, base, names)
    factors = jax.device_put({path: adapter[path].factors for path in sites if path in adapter})
    return {path: dataclasses.replace(adapter[path], factors=arrays) for path, arrays in factors.items()}


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


def _group_tensors(tensors: Tensors, owners: Owners, config: Config) -> FileContent:
    """The tensors by what they are, by the suffixes of their names."""
    content = FileContent(collections.defaultdict(dict), {}, {}, {})
    for key, tensor in tensors.items():
        if key in PROJECTIONS:
            continue
        if not key.startswith(PREFIX):
            raise ValueError(f"The file has the tensor {key}, and all of PEFT's start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in (*SUFFIXES, *_TOKENS) if name.endswith(f".{suffix}")), "")
        module = name.removesuffix(f".{suffix}")
        if suffix in _TOKENS:
            content.tokens[module] = tensor
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


def _collect(
    config: Config,
    content: FileContent,
    owners: Owners,
    heads: set[str],
    tensors: Tensors,
    sites: Sites,
    base: BaseParams,
) -> Collected:
    """The factors of every module in the file, by the weights that they belong to."""
    collected = new_collection()
    for name, by_suffix in content.adapters.items():
        if name not in heads:
            add_module(collected, name, _adapted_module(config, name, by_suffix, owners, tensors), owners)
    for name, tensor in content.trained.items():
        site = sites[owners[name][0].location.path]
        if site.is_lookup and site.is_product:
            raise ValueError(
                f"{site.path} is an embedding and the output head at once, and the file trains {name} alone: untie "
                "them in the program."
            )
        add_module(collected, name, read_full(name, tensor, owners[name]), owners)
    for name, tensor in content.tokens.items():
        add_module(collected, name, read_token_rows(name, tensor, config, owners[name], base), owners)
    for name, tensor in content.bases.items():
        if name not in heads:
            check_stored_base(name, tensor, owners[name], base)
    return collected


def _adapted_module(config: Config, name: str, by_suffix: Tensors, owners: Owners, tensors: Tensors) -> ModuleFactors:
    """The factors of an adapted module.

    Arguments:
        config: the configuration.
        name: of the module.
        by_suffix: its tensors.
        owners: of all modules.
        tensors: all of the file.
    """
    location, method = owners[name][0].location, method_of(config, name)
    if not location.is_matrix:
        raise ValueError(f"The file adapts {name}, and {location.path} {location.weight.shape} is not a matrix.")
    axes, kind = flat_axes(method, location), location.module.kind
    layout = layout_of(method, kind, axes, name)
    suffixes = {row.suffix for row in layout.values()}
    if suffixes != set(by_suffix):
        raise ValueError(
            f"{name}, {type(method).__name__} of {kind}: missing {sorted(suffixes - set(by_suffix))}, left over "
            f"{sorted(set(by_suffix) - suffixes)}."
        )
    sizes = sizes_of(owners[name]).with_axes(own_sizes(method, location))
    arrays = {
        factor: from_file(by_suffix[row.suffix], axes[factor], row.axes, sizes, f"{name}.{row.suffix}")
        for factor, row in layout.items()
    }
    factors = ModuleFactors(method, 1.0, arrays, axes)
    if isinstance(method, VeRA):
        return read_vera(name, factors, sizes.axes["in"], arrays["b"].shape[0], tensors)
    if isinstance(method, LoKr) and is_unscaled(factors):
        return dataclasses.replace(factors, scale=(method.alpha or 0) / (method.rank or 1))
    return factors
