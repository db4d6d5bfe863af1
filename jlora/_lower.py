"""From an adapter to factored weights, with the checks that it fits."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jlora._factored import Factored
from jlora._method import Adapter, Update
from jlora._paths import near


def lowered(update: Update, w: Factored) -> Factored:
    """The weight with an update's networks."""
    return update.method.lower(update, w)


def check(adapter: Adapter, leaves: Mapping[str, Any]) -> None:
    """Raises, with every misfit, unless each update has its weight among `leaves`."""
    misfits = []
    for path, update in adapter.items():
        if not isinstance(update, Update):
            raise TypeError(f"An adapter maps paths to updates as jlora.init makes them; {path!r} holds {update!r}.")
        if path not in leaves:
            misfits.append(f"{path}: no such parameter ({near(path, leaves)})")
            continue
        leaf = leaves[path]
        if tuple(leaf.shape) != update.shape:
            misfits.append(
                f"{path}: the adapter was made for shape {update.shape}, the parameter has {tuple(leaf.shape)}"
            )
        elif not jnp.issubdtype(leaf.dtype, jnp.floating):
            misfits.append(f"{path}: the parameter's dtype {leaf.dtype} is not floating-point")
    if misfits:
        raise ValueError(
            "The adapter does not fit these parameters. Pass the tree it was made for (jlora.trace, jlora.init):\n  "
            + "\n  ".join(misfits)
        )
