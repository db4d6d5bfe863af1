"""How a weight is updated: the method, and the update that an adapter holds for one path."""

import abc
import dataclasses
import functools
from typing import Any

import jax

from jlora._context import Role
from jlora._factored import Factored
from jlora._site import Site


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "frozen", "key"],
    meta_fields=["method", "roles", "shape", "scale"],
)
@dataclasses.dataclass(frozen=True)
class Update:
    """What an adapter holds for one weight.

    Arguments:
        factors: the trainable arrays, by name. The names are the groups of `labels`.
        frozen: arrays that belong to the update and are not trained.
        key: PRNG keys of the dropout, one for every layer of a stacked weight; None where nothing is dropped.
        method: the method with its hyper-parameters.
        roles: the role of every axis of the weight.
        shape: the shape of the weight.
        scale: a static multiplier of the whole update, 1 unless `jlora.scale` changed it.
    """

    factors: dict[str, Any]
    method: "Method"
    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)
    key: Any = None
    scale: float = 1.0


Adapter = dict[str, Update]


class Method(abc.ABC):
    """A way to update a weight: hyper-parameters and two pure functions.

    A method is a frozen dataclass whose fields are numbers, strings, booleans or None, so that it can be saved;
    a field that only `init` needs is left out of the saved form by `settled`.
    """

    dropout: float = 0.0

    def refusal(self, site: Site) -> str:
        """Why the method cannot adapt a site, with the remedy; empty where it can."""
        return site.refusal

    def settled(self) -> "Method":
        """The method without what only `init` needs."""
        return self

    @abc.abstractmethod
    def init(self, key: jax.Array, site: Site, dtype: Any) -> dict[str, jax.Array]:
        """New trainable factors for a site."""

    @abc.abstractmethod
    def lower(self, update: Update, w: Factored) -> Factored:
        """The weight with the update's networks."""
