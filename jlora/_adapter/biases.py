"""Training biases beside the adapted weights."""

import re
from typing import Literal

from jlora._adapter.targets import Targets, select_methods
from jlora._interpreter.site import Site
from jlora._trace.sites import Sites
from jlora.methods._base import Method
from jlora.methods.full import Full

_ADDITIONS = {"add", "sub", "add_any"}


def with_biases(sites: Sites, targets: Targets, which: Literal["none", "all", "lora_only"]) -> dict[str, Method]:
    """Extends targets so that biases are trained too, each by `Full`.

    A bias is a parameter that the program uses in additions only.

    Arguments:
        sites: from `jlora.trace`.
        targets: as for `jlora.init`.
        which: "none" adds no bias, "all" adds every bias of the program, "lora_only" those with the same parent path
            as an adapted weight.

    Returns:
        targets for `jlora.init`, one pattern for each path.

    Raises:
        TypeError: if `sites` or `targets` has another type.
        ValueError: as `jlora.init` for the targets, and if `which` is not one of the three.

    Example:
        targets = jlora.with_biases(sites, {r".*/kernel": jlora.LoRA(rank=8)}, "lora_only")
        adapter = jlora.init(key, sites, targets)
    """
    if which not in ("none", "all", "lora_only"):
        raise ValueError(f"`which` must be 'none', 'all' or 'lora_only', not {which!r}.")
    selected = dict(select_methods(sites, targets))
    parents = {_parent(path) for path in selected}
    for path, site in sites.items():
        is_wanted = which == "all" or (which == "lora_only" and _parent(path) in parents)
        if is_wanted and path not in selected and _is_bias(site):
            selected[path] = Full()
    return {re.escape(path): method for path, method in selected.items()}


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _is_bias(site: Site) -> bool:
    return site.is_trainable and {use.primitive for use in site.uses} <= _ADDITIONS
