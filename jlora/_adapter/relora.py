"""ReLoRA: merging an adapter and initialising the next one."""

import re
from typing import Any

import jax

from jlora._adapter.init import init
from jlora._adapter.merge import merge
from jlora._trace.sites import Sites
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single


def restart(key: jax.Array, sites: Sites, params: Any, adapter: Adapter) -> tuple[Any, Adapter]:
    """Merges an adapter into its base and initialises a new one of the same methods.

        W <- W + s A B,    then new A and B: several runs of rank r add an update of a higher rank

    The state of the optimiser belongs to the old factors: initialise it again, `state = tx.init(adapter)`.

    Arguments:
        key: a PRNG key.
        sites: from `jlora.trace`.
        params: the base parameters; they are not changed.
        adapter: the adapter. It does not store its initialisers, so the new factors have the default ones.

    Returns:
        the new base and the new adapter. Quantised weights stay quantised; the merged ones are rounded again.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if the adapter does not fit the parameters.

    Example:
        params, adapter = jlora.restart(key, sites, params, adapter)
        state = tx.init(adapter)

    Lialin et al. 2023, ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv:2307.05695.
    """
    targets = {re.escape(path): update.method for path, update in as_single(adapter).items()}
    merged = merge(params, adapter, requantize=True)
    return merged, init(key, sites, targets, params=merged)
