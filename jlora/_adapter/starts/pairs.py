"""Updates with other factors: what all starts share."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jlora.methods._base import Method, Update
from jlora.methods.dora import DoRA
from jlora.methods.lora import LoRA

# The methods that a start may initialise, by whether the product of the new factors is zero.
_METHODS: dict[bool, tuple[type, ...]] = {True: (LoRA, DoRA), False: (LoRA,)}


def check(path: str, update: Update, start: str, *, is_zero: bool) -> LoRA | DoRA:
    """The method of an update that a start can initialise.

    Arguments:
        path, update: the update.
        start: the name of the start, for errors.
        is_zero: whether the product of the new factors is zero. If not, the initial product is subtracted.

    Raises:
        ValueError: if the method is another one, or the update is not as `jlora.init` returns it.
    """
    method: Method = update.method
    if not isinstance(method, _METHODS[is_zero]):
        names = " or ".join(kind.__name__ for kind in _METHODS[is_zero])
        raise ValueError(f"{path}: {start} initialises {names}, not {method}. Leave it out, or change its method.")
    if update.key is not None or update.rank_mask is not None or update.scale != 1 or update.traced_scale is not None:
        raise ValueError(
            f"{path}: {start} takes the adapter as jlora.init returns it, without with_dropout, with_rank and scale."
        )
    return method  # pyright: ignore[reportReturnType]


def with_pair(update: Update, a: ArrayLike, b: ArrayLike, *, is_zero: bool) -> Update:
    """The update with other factors, at the same scale; a product that is not zero is subtracted again.

    Arguments:
        update: the update; `check` accepts it.
        a: `(*stack, in, rank)`, of any rank.
        b: `(*stack, rank, out)`.
        is_zero: whether the product is zero.
    """
    method: LoRA | DoRA = update.method  # pyright: ignore[reportAssignmentType]
    rank = jnp.shape(a)[-1]
    power = 0.5 if method.rank_stabilized else 1.0
    alpha = None if method.alpha is None else method.alpha * (rank / method.rank) ** power
    offset = {} if isinstance(method, DoRA) else {"offset": method.offset or not is_zero}
    method = dataclasses.replace(method, rank=rank, alpha=alpha, **offset)
    shapes, dtype = method.shapes(update.axes), update["a"].dtype
    pair = {name: jnp.asarray(array, dtype).reshape(shapes[name]) for name, array in (("a", a), ("b", b))}
    factors = {name: pair.get(name, array) for name, array in update.factors.items()}
    frozen = {name: pair.get(name, array) for name, array in update.frozen.items()}
    initial = jax.tree.map(jnp.copy, factors) if method.offset else {}
    return dataclasses.replace(update, method=method, factors=factors, frozen=frozen, initial=initial)
