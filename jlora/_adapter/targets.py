"""Targets: which weights an adapter updates, and by which method."""

from collections.abc import Mapping

from jlora._trace.sites import Sites
from jlora._tree.patterns import select_by_pattern
from jlora.methods._base import Method

Targets = Mapping[str, Method | None] | Method


def select_methods(sites: Sites, targets: Targets) -> dict[str, Method]:
    """The method of every path that the targets select.

    Raises:
        TypeError: if `sites` is not from `jlora.trace`, or a target is not a method.
        ValueError: as `select_by_pattern`, and if a single method has nothing to adapt.
    """
    if not isinstance(sites, Sites):
        raise TypeError(f"`sites` must come from jlora.trace, not {type(sites).__name__}.")
    for target in targets.values() if isinstance(targets, Mapping) else [targets]:
        if targets is None or not isinstance(target, Method | None):
            given = f"the class {target.__name__}" if isinstance(target, type) else type(target).__name__
            raise TypeError(
                f"Targets are a method such as jlora.LoRA(rank=8), or a dict from patterns to methods, not {given}."
            )
    if isinstance(targets, Method):
        selected = {path: targets for path, site in sites.items() if site.is_product}
        if not selected:
            raise ValueError("No matmul or convolution of the program uses a parameter. print(sites) shows all.")
        return selected
    return select_by_pattern(sites, targets)
