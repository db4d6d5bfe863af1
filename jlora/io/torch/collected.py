"""The factors of the modules in a file, collected by the weights that they belong to, and the updates of those."""

import collections
import dataclasses
from collections.abc import Mapping

from jlora._trace.sites import Sites
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.join_modules import join_modules, stack_modules
from jlora.io.torch.split_modules import split_out_axis
from jlora.io.torch.weight_location import Index, Owners, WeightLocation
from jlora.methods import Full
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._common.factor_axes import WeightAxes

# For every weight, by the index of its stack and the position of a module in it, the module's factors.
Collected = dict[str, dict[Index, dict[int, ModuleFactors]]]


def new_collection() -> Collected:
    """A collection without factors."""
    return collections.defaultdict(lambda: collections.defaultdict(dict))


def add_module(collected: Collected, name: str, factors: ModuleFactors, owners: Owners) -> None:
    """Adds a module's factors to those of its weight, or of its several weights.

    Raises:
        ValueError: if the weight has factors for this module already, or the factors cannot be divided.
    """
    weights = owners[name]
    parts = [factors]
    if weights[0].location.module.part is not None:
        parts = split_out_axis(factors, [owner.location.count("out") for owner in weights], name)
    for (location, index, position), part in zip(weights, parts, strict=True):
        if position in collected[location.path][index]:
            raise ValueError(f"The file trains {name} in two ways, and jlora one way a weight: train it in one.")
        collected[location.path][index][position] = part


def update_of(
    by_index: Mapping[Index, Mapping[int, ModuleFactors]], location: WeightLocation, zeros_if_missing: bool
) -> Update:
    """The update of a weight from the factors of its modules.

    Arguments:
        by_index: the factors, by the index of the stack and the position of the module.
        location: of the weight.
        zeros_if_missing: whether a layer of a stack without factors is one that is not adapted.

    Raises:
        ValueError: if no update has such factors.
    """
    positions = range(location.num_joined)
    joined = {
        index: join_modules([factors.get(position) for position in positions], location)
        for index, factors in by_index.items()
    }
    return stack_modules(joined, location, zeros_if_missing=zeros_if_missing)


def check_updates(adapter: Adapter, sites: Sites) -> None:
    """Checks the factors of each update.

    Raises:
        ValueError: unless they are those that the method has for the site.
    """
    templates: dict[tuple[Method, WeightAxes], Mapping[str, tuple[int, ...]]] = {}  # layers that are alike share one
    for path, update in adapter.items():
        site, method = sites[path], update.method
        if not isinstance(method, Full) and site.unsupported_reason:
            raise ValueError(f"{type(method).__name__} cannot adapt {path} {site.shape}: {site.unsupported_reason}.")
        axes = dataclasses.replace(update, roles=site.roles, shape=site.shape).axes
        if (method, axes) not in templates:
            templates[method, axes] = method.shapes(axes)
        shapes = {name: array.shape for name, array in update.factors.items()}
        if shapes != templates[method, axes]:
            raise ValueError(
                f"{path}: the file's factors have the shapes {shapes}; {method} has {templates[method, axes]}."
            )
