"""The modules that an adapter's weights make up; several weights may be parts of one module."""

import math
from collections.abc import Mapping

import numpy as np

from jlora._interpreter.context import Role
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.infer.result import for_weights
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.torch.join_modules import concatenate_out_axis
from jlora.io.torch.module_names import Names, bias_hint, no_match_error
from jlora.io.torch.split_modules import split_modules
from jlora.io.torch.weight_location import ModuleOwner, Weight, WeightLocation, locate_weights, owners_of
from jlora.methods import Full
from jlora.methods._base import Adapter, Update


def locate_adapter(adapter: Adapter, names: Names, base: BaseParams) -> dict[str, WeightLocation]:
    """The locations of the adapted weights, and of all other parameters that the map knows.

    Arguments:
        adapter: the adapter.
        names: the map.
        base: the base parameters.

    Raises:
        ValueError: if the map has no module for an adapted weight.
    """
    weights = {path: Weight(tuple(leaf.shape), ()) for path, leaf in (base.leaves or {}).items()}
    weights |= {path: Weight(update.shape, update.roles) for path, update in adapter.items()}
    names = for_weights(names, weights, adapter)
    locations = locate_weights(names, weights)
    unnamed = {path: names for path in adapter if path not in locations}
    if unnamed:
        hints = [hint for path in unnamed if path.endswith("bias") and (hint := bias_hint(path, names))]
        raise no_match_error("The names have no module for these:", unnamed, names, adapter, hints)
    return locations


def complete_modules(adapter: Adapter, locations: Mapping[str, WeightLocation]) -> Adapter:
    """The adapter with all that modules hold that are trained in full: a difference of zero for each missing parameter.

    Arguments:
        adapter: the adapter.
        locations: of all weights that the map knows.
    """
    complete = dict(adapter)
    trained = {
        name: update
        for path, update in adapter.items()
        if isinstance(update.method, Full)
        for name in locations[path].first_modules
    }
    for path, location in locations.items():
        sibling = next((trained[name] for name in location.first_modules if name in trained), None)
        if sibling is not None and path not in adapter:
            complete[path] = _no_change(location, sibling.roles)
    saved = _modules_with_weights(complete, locations, trained=True)
    for path, location in locations.items():  # the bias of such a module: PEFT needs all parameters that it has
        if path not in complete and _bias_modules(location) & saved:
            complete[path] = _no_change(location, location.weight.roles)
    return complete


def complete_biases(adapter: Adapter, locations: Mapping[str, WeightLocation]) -> Adapter:
    """The adapter with all biases that PEFT's `bias` names, if it trains some: a difference of zero for the others.

    PEFT trains the biases of all adapted modules ("lora_only"), or all biases ("all"), apart from those of modules that
    are trained in full.

    Arguments:
        adapter: the adapter.
        locations: of all weights that the map knows.
    """
    saved, adapted = _modules_with_weights(adapter, locations, trained=True), _modules_with_weights(adapter, locations)
    modules_of_bias = {path: _bias_modules(location) - saved for path, location in locations.items()}
    biases = {path: modules for path, modules in modules_of_bias.items() if modules}
    trained = [path for path in biases if path in adapter]
    if all(biases[path] <= adapted for path in trained):
        biases = {path: modules for path, modules in biases.items() if modules & adapted}
    missing = [path for path in biases if trained and path not in adapter]
    return {**adapter, **{path: _no_change(locations[path], locations[path].weight.roles) for path in missing}}


def _modules_with_weights(
    adapter: Adapter, locations: Mapping[str, WeightLocation], *, trained: bool = False
) -> set[str]:
    """The modules whose weight is adapted, or trained in full."""
    paths = [path for path, update in adapter.items() if isinstance(update.method, Full) == trained]
    names = {name for path in paths for names in locations[path].modules.values() for name in names}
    return {name.removesuffix(".weight") for name in names if not name.endswith(".bias")}


def _bias_modules(location: WeightLocation) -> set[str]:
    """The modules whose biases a parameter holds; none if it is another parameter."""
    names = {name for names in location.modules.values() for name in names}
    return {name.removesuffix(".bias") for name in names if name.endswith(".bias")}


def _no_change(location: WeightLocation, roles: tuple[Role, ...]) -> Update:
    shape = location.weight.shape
    return Update({"d": np.zeros(shape, np.float32)}, Full(), roles, shape)


def module_entries(adapter: Adapter, locations: Mapping[str, WeightLocation]) -> dict[str, ModuleEntry]:
    """Every adapted module with its factors; weights that are parts of one module are joined.

    Arguments:
        adapter: the adapter.
        locations: of all weights that the map knows.

    Raises:
        ValueError: if the updates of the parts have no common form, or a part's size is not known.
    """
    by_path = {path: split_modules(update, locations[path]) for path, update in adapter.items()}
    entries = {}
    for name, owners in owners_of(locations).items():
        parts = [
            by_path[o.location.path][o.stack_index][o.position] if o.location.path in by_path else None for o in owners
        ]
        adapted = [owner.location for owner, part in zip(owners, parts, strict=True) if part is not None]
        if not adapted:
            continue
        factors = parts[0]
        if adapted[0].module.part is not None:
            factors = concatenate_out_axis(parts, _out_sizes(name, owners, adapted[0]), name)
        assert factors is not None
        entries[name] = ModuleEntry(adapted[0], factors)
    return entries


def _out_sizes(name: str, owners: list[ModuleOwner], adapted: WeightLocation) -> list[int]:
    """The out sizes of a module's parts, by the sizes of an adapted one: the others have no roles."""
    if [owner.location.module.part for owner in owners] != list(range(len(owners))):
        raise ValueError(
            f"{name} consists of several weights, and some are not in the adapter: pass params=, the base parameters, "
            "for their sizes."
        )
    per_out = math.prod(adapted.sizes("stack")) * max(adapted.count("in"), 1)
    return [math.prod(owner.location.weight.shape) // per_out for owner in owners]
