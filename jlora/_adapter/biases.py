"""What else to train beside the adapted weights, and starting over."""

import re
from typing import Any, Literal

import jax

from jlora._adapter.adapt import Targets, choose, init
from jlora._adapter.merge import merge
from jlora._interpreter.site import Site
from jlora._trace.sites import Sites
from jlora.methods._base import Adapter, Method
from jlora.methods._lowering import as_single
from jlora.methods.full import Full

_SUMS = {"add", "sub", "add_any"}


def with_biases(sites: Sites, targets: Targets, which: Literal["none", "all", "lora_only"]) -> dict[str, Method]:
    """Targets that train biases too, each as a whole (`Full`).

    A bias is a parameter that the program does nothing with but add it.

    Arguments:
        sites: from `jlora.trace`.
        targets: as for `jlora.init`.
        which: "none" adds nothing, "all" every bias of the program, "lora_only" those that lie beside an adapted
            weight, under the same parent.

    Returns:
        targets for `jlora.init`, one pattern a path.

    Raises:
        ValueError: as `jlora.init` does for the targets, and where `which` is unknown.
    """
    if which not in ("none", "all", "lora_only"):
        raise ValueError(f"which is 'none', 'all' or 'lora_only', not {which!r}.")
    chosen = dict(choose(sites, targets))
    parents = {_parent(path) for path in chosen}
    for path, site in sites.items():
        beside = which == "all" or (which == "lora_only" and _parent(path) in parents)
        if beside and path not in chosen and _is_bias(site):
            chosen[path] = Full()
    return {re.escape(path): method for path, method in chosen.items()}


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _is_bias(site: Site) -> bool:
    return site.is_trainable and {use.primitive for use in site.uses} <= _SUMS


def restart(key: jax.Array, sites: Sites, params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    """Folds an adapter into its base and starts a new one of the same methods there: a higher rank in several runs.

    The optimiser's state belongs to the old factors: make a new one, `state = tx.init(adapter)`.

    Arguments:
        key: a PRNG key.
        sites: from `jlora.trace`.
        params: the base parameters; they stay as they are.
        adapter: the adapter. Initialisers are not kept in it, so the new factors start as their method's default.

    Returns:
        the new base and the new adapter. Quantised weights stay quantised, and those that changed are rounded again.

    Lialin et al. 2023, ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv:2307.05695.
    """
    targets = {re.escape(path): update.method for path, update in as_single(adapter).items()}
    merged = merge(params, adapter, requantize=True)
    return merged, init(key, sites, targets, params=merged)
