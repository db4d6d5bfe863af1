"""ReLoRA: merging an adapter and initialising the next one."""

from typing import Any

import jax
import jax.numpy as jnp

from jlora._adapter.init import new_update
from jlora._adapter.merge import merge
from jlora._trace.sites import Sites, check_sites
from jlora._tree.paths import named_leaves
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single
from jlora.methods._sharing import share


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
        TypeError: if `sites` is not from `jlora.trace`, or `adapter` is not an adapter.
        ValueError: if the adapter does not fit the parameters.

    Example:
        params, adapter = jlora.restart(key, sites, params, adapter)
        state = tx.init(adapter)

    Lialin et al. 2023, ReLoRA: High-Rank Training Through Low-Rank Updates, arXiv:2307.05695.
    """
    check_sites(sites)
    merged = merge(params, adapter, requantize=True)
    leaves = dict(named_leaves(merged))
    # The adapter fits these weights. A file may give a narrow layer a rank above its sides, which `init` refuses.
    updates = {
        path: new_update(key, sites[path], update.method, jnp.float32, leaves[path], is_supported=True)
        for path, update in as_single(adapter).items()
    }
    return merged, share(updates)
