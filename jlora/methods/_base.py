"""How a weight is updated: the method, and the update that an adapter holds for one path."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
from jax import lax

from jlora._interpreter.context import Role
from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora._pretty import short_arrays, short_call
from jlora.methods._common import hyperparameters as _hyperparameters


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
        frozen: arrays that belong to the update and are not trained. Their gradients are zero; `jlora.mask` keeps an
            optimiser that changes arrays without gradients (weight decay) off them.
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

    def __getitem__(self, name: str) -> Any:
        """An array by its name; one that is not trained is a constant."""
        return self.factors[name] if name in self.factors else lax.stop_gradient(self.frozen[name])

    def __repr__(self) -> str:
        return short_arrays(self, first="method", spread="factors", hidden=("roles", "shape"))


Adapter = dict[str, Update]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
    """A way to update a weight: hyper-parameters and two pure functions.

    A method is a frozen dataclass whose fields are numbers, strings, booleans, None or tuples of them, so that it can
    be saved; a field that only `init` needs is reset by `settled`. Fields that are named and typed as those of
    jlora's own methods (rank, alpha, dropout) are checked as they are there. The law's tests, `save` and `load` find it
    by themselves.

    Arguments:
        offset: starts from the base whatever the factors are, W - delta(start) + delta(factors): `jlora.init` keeps a
            frozen copy of the factors.

    Attributes:
        reads_base: whether the update depends on the weight's value, so that merging cannot be taken back.
        scales_base: whether the update multiplies the weight: it starts from the base as it is.
        dropout: the share of the input that the update's branch drops in training.
    """

    offset: bool = False
    depends_on_weight: ClassVar[bool] = False
    is_multiplicative: ClassVar[bool] = False
    dropout = 0.0  # a field where a method has dropout

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # else each dataclass would get a generated one, with all fields
            cls.__repr__ = Method.__repr__

    def __repr__(self) -> str:
        return short_call(self, always=("rank",))

    def __post_init__(self) -> None:
        _hyperparameters.check(self)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the arrays that do not train."""
        return ()

    @property
    def init_needs_weight(self) -> bool:
        """Whether `init` needs the weight's value."""
        return False

    def unsupported_reason(self, site: Site) -> str:
        """Why the method cannot adapt a site, with the remedy; empty where it can."""
        return site.unsupported_reason

    def without_init_fields(self) -> "Method":
        """The method without what only `init` needs."""
        return self

    @abc.abstractmethod
    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        """New arrays for a site, those that are frozen included; `base` is the weight where it is known."""

    @abc.abstractmethod
    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        """The weight with the update's networks and gains."""
