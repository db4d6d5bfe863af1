"""From an adapter to PEFT's tensors and configuration."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jlora._adapter.to_lora import to_lora
from jlora.io.peft import forms, maps, products, structured
from jlora.io.peft.absent import WHOLE_MODULES, needs_base
from jlora.io.peft.attention import check_attention
from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.deltas import BaseParams, to_absolute, without_scaled_biases
from jlora.io.peft.form_methods import fields_of_blocks
from jlora.io.peft.forms import add_form, has_form, with_indices
from jlora.io.peft.frod import OTHER_BASIS
from jlora.io.peft.from_base import checked_against_base
from jlora.io.peft.full_weights import add_tokens, add_trained, only_tokens, rows_as_full
from jlora.io.peft.glora import add_glora, with_one_form
from jlora.io.peft.layouts import ADAPTERS
from jlora.io.peft.lokr import is_scrambled
from jlora.io.peft.lora_variants import variant_fields
from jlora.io.peft.maps import add_maps, has_map
from jlora.io.peft.method_fields import ia3_fields, is_flipped, rank_fields
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.module_parts import complete_biases, complete_modules, locate_adapter, module_entries
from jlora.io.peft.monteclora import add_monteclora
from jlora.io.peft.products import add_products, with_one_rank
from jlora.io.peft.pvera import add_pvera
from jlora.io.peft.structured import add_structured, check_drawn, with_places
from jlora.io.peft.targets import check_endings, exact_targets
from jlora.io.peft.tensors import Tensors, module_tensors
from jlora.io.peft.trained_vectors import file_of_vectors
from jlora.io.peft.types import PEFT_TYPES
from jlora.io.peft.uniform import check_experts, check_vllm, with_uniform_rank
from jlora.io.peft.vera import add_vera
from jlora.io.torch.module_names import Names
from jlora.io.torch.weight_location import WeightLocation, module_of, owners_of
from jlora.methods import (
    IA3,
    OSF,
    DoRA,
    FRoD,
    Full,
    GLoRA,
    GraLoRA,
    GroupedLoRA,
    HiRA,
    LoKr,
    LoRA,
    MiSS,
    MonteCLoRA,
    PVeRA,
    TinyLoRA,
    VeRA,
)
from jlora.methods._base import Adapter, Method, Update

TARGETS = (None, "vllm")
Entries = dict[str, ModuleEntry]
# What gives the tensors of a type PEFT's form, and the fields of its configuration; all others are variants of LoRA.
_WRITERS: tuple[tuple[tuple[type[Method], ...], Callable[[Entries, Tensors], Config]], ...] = (
    ((IA3,), lambda modules, tensors: ia3_fields(modules)),
    ((VeRA,), add_vera),
    ((PVeRA,), add_pvera),
    ((GLoRA,), add_glora),
    ((GraLoRA, OSF), lambda modules, tensors: fields_of_blocks(modules, is_flipped(modules))),
    (forms.METHODS, add_form),
    (maps.METHODS, add_maps),
    (structured.METHODS, add_structured),
    (products.METHODS, add_products),
)
# Of a kind of module that PEFT has not for these, the equal LoRA is written.
_HAVE_LORAS = (*products.METHODS, GLoRA)


class Files(NamedTuple):
    """What is written: the configuration, the tensors, and a sentence for each change of form."""

    config: Config
    tensors: Tensors
    notes: tuple[str, ...]


def peft_files(adapter: Adapter, names: Names, params: Any, target: str | None) -> Files:
    """The files for an adapter.

    Arguments:
        adapter: the adapter.
        names: the map.
        params: the base parameters, or None.
        target: "vllm" for plain LoRA of one rank and scale, or None.

    Raises:
        ValueError: if PEFT has no equal for the adapter.
    """
    if target not in TARGETS:
        raise ValueError(f"target is one of {TARGETS}, not {target!r}.")
    if not adapter:
        raise ValueError("The adapter is empty: there is nothing to save.")
    base = BaseParams(params)
    locations = locate_adapter(adapter, names, base)
    adapter = {path: rows_as_full(path, update, locations[path]) for path, update in adapter.items()}
    adapter = without_scaled_biases(adapter, base, locations, names)
    for path, update in adapter.items():
        check_drawn(path, update)
    adapter, notes = as_one_method(adapter, locations, params, target)
    if any(isinstance(update.method, FRoD) for update in adapter.values()):
        notes.append(OTHER_BASIS)
    given, adapter = adapter, complete_modules(complete_biases(adapter, locations), locations)
    absolute = {path: to_absolute(path, with_places(with_indices(update)), base) for path, update in adapter.items()}
    entries = module_entries(absolute, locations)
    trained = {name: entry for name, entry in entries.items() if isinstance(entry.factors.method, Full)}
    adapted = {name: entry for name, entry in entries.items() if name not in trained}
    if not adapted and (vectors := file_of_vectors(trained, module_entries(given, locations))):
        return Files(*vectors, tuple(notes))
    owners = owners_of(locations)
    check_attention(adapted, owners)
    adapted = checked_against_base(adapted, owners, base)
    adapted = _for_target(with_one_form(with_one_rank(adapted, notes), notes), trained, target, notes)
    config, tensors = _config_and_tensors(adapted, trained, base)
    modules = [name for name, parts in owners.items() if parts[0].location.module.kind != "parameter"]
    check_endings(config, {module_of(name, owners) for name in owners}, adapted)
    config["target_modules"] = exact_targets(config["target_modules"], modules)
    return Files(config, tensors, tuple(notes))


def as_one_method(
    adapter: Adapter, locations: Mapping[str, WeightLocation], params: Any, target: str | None
) -> tuple[Adapter, list[str]]:
    """The adapter with one method that PEFT has; LoRA if there are several.

    Arguments:
        adapter: the adapter.
        locations: of its weights, by path; none if all updates become LoRAs.
        params: the base parameters, or None.
        target: "vllm" for LoRA alone, or None.

    Returns:
        the adapter, and a sentence for every update that changed.
    """
    updates = {path: update for path, update in adapter.items() if not isinstance(update.method, Full)}
    saved = {path: _saved_class(update, locations.get(path), params) for path, update in updates.items()}
    classes: set[type[Method]] = {saved_class or LoRA for saved_class in saved.values()}
    saved_class = LoRA if target == "vllm" or len(classes) > 1 else next(iter(classes), LoRA)
    if len({update.method for update in updates.values() if _is_of_all_modules(update.method)}) > 1:
        saved_class = LoRA
    notes, converted = [], dict(adapter)
    for path, update in updates.items():
        if saved[path] is saved_class:
            continue
        lora, errors = to_lora({path: update}, params)
        converted |= lora
        way = "by its factors" if errors[path] == 0 else f"by SVD with an error of {errors[path]:.1e}"
        rank = getattr(lora[path].method, "rank", None)
        notes.append(f"{path}: {type(update.method).__name__} became a LoRA of rank {rank}, {way}.")
    return converted, notes


def _is_of_all_modules(method: Method) -> bool:
    """Whether PEFT has one such method for all modules: arrays that they share, or fields without patterns."""
    return bool(method.shared_arrays) or isinstance(method, (GraLoRA, MiSS))


def _saved_class(update: Update, location: WeightLocation | None, params: Any) -> type[Method] | None:
    """The method that PEFT can store this update as without a conversion; None if PEFT does not have it."""
    method_class = type(update.method)
    if update.method.offset or not has_form(update) or not has_map(update):
        return None
    if isinstance(update.method, GroupedLoRA):  # a LoRA for each module
        return LoRA
    if location is not None and not _is_stored_at(update, location):
        return None
    if method_class in WHOLE_MODULES:  # their blocks or singular vectors are those of a whole module
        if location is None or location.num_joined != 1 or location.module.part is not None:
            return None
        if params is None and needs_base(update.method):
            return None
    return method_class if method_class in PEFT_TYPES else None


def _is_stored_at(update: Update, location: WeightLocation) -> bool:
    """Whether PEFT's form of the method holds an update of this module."""
    method_class = type(update.method)
    if method_class is HiRA and location.module.tied:  # PEFT would adapt one of the two uses
        return False
    if isinstance(update.method, TinyLoRA) and location.num_joined > 1 and update.method.rank > min(location.out_sizes):
        return False
    if method_class is LoKr and is_scrambled(location.kernel, "d" in update.factors):
        return False
    return method_class not in _HAVE_LORAS or location.module.kind in ADAPTERS[method_class]


def _for_target(adapted: Entries, trained: Entries, target: str | None, notes: list[str]) -> Entries:
    """The adapted modules with one rank and scale if the reader needs them; each change is added to the notes."""
    if target == "vllm":
        check_vllm(adapted, trained)
        adapted = with_uniform_rank(adapted, "vLLM reads one rank and one scale", notes)
    experts = {name: entry for name, entry in adapted.items() if entry.location.module.kind == "parameter"}
    if experts:
        check_experts(experts)
        adapted = {**adapted, **with_uniform_rank(experts, "PEFT warns of patterns for parameters", notes)}
    return adapted


def _config_and_tensors(adapted: Entries, trained: Entries, base: BaseParams) -> tuple[Config, Tensors]:
    embeddings = {name: entry for name, entry in trained.items() if entry.location.module.kind == "embedding"}
    others = {name: entry for name, entry in trained.items() if name not in embeddings}
    if not adapted and others:
        raise ValueError(
            f"PEFT has no file of trained weights alone, {sorted(trained)}: adapt a weight by LoRA too, or save the "
            "adapter by jlora.save."
        )
    if not adapted:
        return only_tokens(embeddings, base)
    config, tensors = _adapted_modules(adapted)
    add_tokens(config, tensors, embeddings, base)
    add_trained(config, tensors, others, adapted)
    return config, tensors


def _adapted_modules(adapted: Entries) -> tuple[Config, Tensors]:
    """Configuration and tensors of the adapted modules."""
    modules = {name: entry for name, entry in adapted.items() if entry.location.module.kind != "parameter"}
    parameters = {name: entry for name, entry in adapted.items() if name not in modules}
    tensors: Tensors = {}
    for name, entry in adapted.items():
        owner = _wrapping_module(name, list(parameters)) if name in parameters else name
        tensors |= {f"{PREFIX}{owner}.{suffix}": array for suffix, array in module_tensors(name, entry).items()}
    method = next(iter(adapted.values())).factors.method
    config: Config = {
        "auto_mapping": None,
        "inference_mode": True,
        "peft_type": PEFT_TYPES[type(method)],
        "revision": None,
        "target_modules": sorted(modules),
    }
    write = next((write for methods, write in _WRITERS if isinstance(method, methods)), None)
    if write is not None:
        config |= write(modules, tensors)
    elif isinstance(method, MonteCLoRA):
        config |= rank_fields(adapted) | add_monteclora(modules, tensors)
    else:
        config |= rank_fields(adapted) | variant_fields(adapted)
    if isinstance(method, (LoRA, DoRA)):
        config["target_parameters"] = sorted(parameters) or None
        config["ensure_weight_tying"] = _add_tied_heads(modules, tensors)
    return config, tensors


def _wrapping_module(name: str, parameters: list[str]) -> str:
    """Where PEFT keeps the tensors of a parameter: it wraps a module once for each, the first one innermost."""
    module = name.rpartition(".")[0]
    siblings = [other for other in parameters if other.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(name))


def _add_tied_heads(modules: Entries, tensors: Tensors) -> bool:
    """Adds the tensors of output heads that are tied to embeddings; returns whether there are any."""
    heads = {name: entry.location.module.tied for name, entry in modules.items() if entry.location.module.tied}
    for name, head in heads.items():
        if isinstance(modules[name].factors.method, DoRA):
            raise ValueError(
                f"{name} is tied to {head}, and DoRA's magnitudes differ between the two in PEFT. Adapt it by LoRA."
            )
        a, b = (tensors[f"{PREFIX}{name}.lora_embedding_{factor}"] for factor in "AB")
        tensors[f"{PREFIX}{head}.lora_A.weight"] = np.ascontiguousarray(b.T)
        tensors[f"{PREFIX}{head}.lora_B.weight"] = np.ascontiguousarray(a.T)
    return bool(heads)
