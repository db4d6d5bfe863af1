"""How a weight is updated: `Method`, and `Update`, what an adapter holds for one path."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax import lax
from jax.typing import DTypeLike

from jlora._interpreter.context import Role
from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora._tree.short_forms import short_arrays, short_call
from jlora.methods import _registry
from jlora.methods._common import declarations, factor_axes, hyperparameters, networks
from jlora.methods._common.axis_sizes import AxisSizes, stack_sizes
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.initializers import Initializer, stacked
from jlora.methods._common.layers import checked_layers, layer_axis, layers_of, numbers_of_layers


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["factors", "frozen", "key", "initial", "rank_mask", "traced_scale", "member"],
    meta_fields=["method", "roles", "shape", "scale"],
)
@dataclasses.dataclass(frozen=True)
class Update:
    """What an adapter holds for one weight.

    Arguments:
        factors: the trainable arrays, by name. The names are the groups of `jlora.labels`.
        method: the method with its hyper-parameters.
        roles: the role of every axis of the weight.
        shape: the shape of the weight.
        frozen: arrays that belong to the update and are not trained. Their gradients are zero; use `jlora.mask` with an
            optimiser that changes arrays without gradients (weight decay).
        key: PRNG keys for dropout, one for every layer of a stacked weight; None without dropout.
        scale: a static multiplier of what the update adds, 1 unless `jlora.scale` changed it. For `Method.lower` the
            traced scale is part of it, and it is an array if there is one.
        initial: the factors at initialisation, of a method with `offset=True`; what they add is subtracted.
        rank_mask: (rank,), a multiplier of every rank, zero for those that this step does not use (`jlora.with_rank`);
            None if it uses all.
        traced_scale: a second multiplier, a scalar array, which may change without another compilation; None without.
        member: a position, an integer scalar, if `factors` and `frozen` are those of all members of a bank, along a
            first axis: the update is that of the member there. Of a method with declared networks; None otherwise.
    """

    factors: dict[str, Any]
    method: "Method"
    roles: tuple[Role, ...]
    shape: tuple[int, ...]
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)
    key: Any = None
    scale: float | jax.Array = 1.0
    initial: dict[str, Any] = dataclasses.field(default_factory=dict)
    rank_mask: Any = None
    traced_scale: Any = None
    member: Any = None

    def __getitem__(self, name: str) -> Any:
        """An array by its name; a frozen one is a constant for differentiation."""
        return self.factors[name] if name in self.factors else lax.stop_gradient(self.frozen[name])

    def __repr__(self) -> str:
        return short_arrays(self, first="method", spread="factors", hidden=("roles", "shape"))

    def joined(self, name: str) -> jax.Array:
        """An array with each group of axes joined, except for the stack: `(*stack, in, rank)`."""
        return factor_axes.join_groups(self[name], self.declared[name], self.axes)

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The numbers of the layers of a stacked weight that are updated; None if all are."""
        return numbers_of_layers(self.method.layers, "the weight", self)

    @property
    def part(self) -> "Update":
        """The same update as that of a smaller weight, which has the updated layers alone."""
        layers = self.layers
        if layers is None:
            return self
        shape, axis = list(self.shape), layer_axis(self)
        shape[axis] = len(layers)
        return dataclasses.replace(self, method=dataclasses.replace(self.method, layers=None), shape=tuple(shape))

    def at_layers(self, array: Any) -> Any:
        """The updated layers of an array that has the axes of the weight."""
        return layers_of(array, self.layers, self)

    @property
    def axes(self) -> WeightAxes:
        """The axes of the weight by group, of the updated layers."""
        return WeightAxes.of(self.part)

    @property
    def declared(self) -> Mapping[str, str]:
        """The axes of every factor, as the method declares them for this weight."""
        return self.method.factors_for(self.axes)


Adapter = dict[str, Update]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A way to update a weight: hyper-parameters, the axes of the factors, and what they add.

        maps(W) + scale * sum of networks

    A method is a frozen dataclass whose fields are numbers, strings, booleans, None or tuples of them, so that it can
    be saved. Most methods are declarations only:

        @dataclasses.dataclass(frozen=True)
        class GatedLoRA(jlora.extend.Method):
            rank: int = jlora.extend.positive_integer(8)

            factors = {"a": "*stack *in rank", "gate": "*stack rank", "b": "*stack rank *out"}
            initializers = {"a": kaiming, "gate": ones, "b": zeros}
            networks = ("a gate b",)

    Shapes, shardings, rank masks, checkpoints and the tests of the law follow from the declarations. A method that
    computes what it adds overrides `lower`; a method that starts from the weight overrides `init`.

    Arguments:
        offset: makes the program equal the base at the start for any initial factors, by the weight
            W - delta(initial) + delta(factors): `jlora.init` stores a frozen copy of the factors.
        layers: of a weight with a stack axis, which layers are updated: a slice, or a tuple of numbers; negative ones
            count from the end. Only these have factors, and all others are those of the base. None for all. Of several
            stack axes the first is meant.

    Attributes:
        factors: the axes of every array, `{"a": "*stack *in rank"}`. A token with a star is a group of the weight's
            axes (`*stack`, `*layers`, `*in`, `*channels`, `*window`, `*out`, `*weight`), any other token an axis of the
            method.
        initializers: the initialiser of each array, `initializer(key, shape, dtype)`; `shape` is that of one layer of a
            stack, with one axis for each token.
        networks: products of factors that are added to the weight, `"a b"`; axes that the weight lacks are summed.
        depends_on_weight: whether the update depends on the weight's value, so that merging cannot be undone.
        is_multiplicative: whether the update multiplies the weight, and so equals the base at the start without offset.
        earlier_values: the values of hyper-parameters that saved adapters of earlier releases lack, if these are not
            the defaults.
        dropout: the share of the input of the low-rank branch that is dropped in training.
        is_sampled: whether `lower` draws from a distribution if the update has a key, and gives its mean otherwise.
    """

    offset: bool = hyperparameters.switch(False)
    layers: slice | Sequence[int] | None = dataclasses.field(default=None, hash=False)  # a slice has no hash

    factors: ClassVar[Mapping[str, str]] = {}
    initializers: ClassVar[Mapping[str, Initializer]] = {}
    networks: ClassVar[tuple[str, ...]] = ()
    depends_on_weight: ClassVar[bool] = False
    is_multiplicative: ClassVar[bool] = False
    earlier_values: ClassVar[Mapping[str, Any]] = {}
    is_sampled: ClassVar[bool] = False
    dropout = 0.0  # a field if the method has dropout

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _registry.register(cls)
        if "__repr__" not in vars(cls):  # otherwise @dataclass generates one, with all fields
            cls.__repr__ = Method.__repr__

    def __repr__(self) -> str:
        return short_call(self, always=("rank",))

    def __post_init__(self) -> None:
        declarations.check_dataclass(type(self))
        hyperparameters.check_fields(self)
        object.__setattr__(self, "layers", checked_layers(type(self).__name__, self.layers))

    @property
    def scale(self) -> float:
        """The multiplier of every declared network, alpha / rank for example."""
        return 1.0

    @property
    def frozen(self) -> tuple[str, ...]:
        """The names of the arrays that are not trained."""
        return ()

    @property
    def shared_arrays(self) -> tuple[str, ...]:
        """The names of the arrays that all weights of an adapter with an equal method have in common.

        Their axes are the method's own. One update of the adapter holds them, and `lower` gets them in each.
        """
        return ()

    def share(self, updates: Mapping[str, Update]) -> Mapping[str, Mapping[str, jax.Array]]:
        """New values of arrays that depend on all the weights that share some, by path and name.

        Arguments:
            updates: the new updates by path, each with all of its arrays.
        """
        return {}

    @property
    def is_random(self) -> bool:
        """Whether an update takes keys in training, for dropout or to draw from a distribution."""
        return self.is_sampled or bool(self.dropout)

    @property
    def init_needs_weight(self) -> bool:
        """Whether `init` needs the weight's value."""
        return False

    def unsupported_reason(self, site: Site) -> str:
        """Why the method cannot adapt a site, and what to do; empty if it can."""
        return site.unsupported_reason

    def without_init_fields(self) -> "Method":
        """The method without the fields that only `init` needs, as an update stores it."""
        return self

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        """The axes of every array for a weight; override it if they depend on the weight."""
        return self.factors

    def initializers_for(self, site: Site) -> Mapping[str, Initializer]:
        """The initialiser of each array; override it if they depend on hyper-parameters or on the site."""
        return self.initializers

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        """The sizes of the method's axes that are not fields of the same name."""
        return {}

    def divided_axes(self, axes: WeightAxes) -> Mapping[str, str]:
        """The method's axes that number equal parts of a group of the weight's axes, so that they are sharded as it is.

        Arguments:
            axes: of the weight.

        Returns:
            the groups by axis, `{"block": "*out"}`; the parts are those of the group's first axis.
        """
        return {}

    def shapes(self, axes: WeightAxes) -> dict[str, tuple[int, ...]]:
        """The shapes of all arrays for a weight."""
        declared = self.factors_for(axes)
        return {name: factor_axes.shape(text, axes, self._all_sizes(axes)) for name, text in declared.items()}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        """Initialises all arrays for a site, frozen ones included.

        Arguments:
            key: a PRNG key.
            site: the weight.
            dtype: the dtype of the arrays.
            base: the value of the weight; None unless `init_needs_weight`.

        Returns:
            the arrays by name, in their declared shapes, or with each group of axes joined: `(*stack, in, rank)`.

        Raises:
            TypeError: if a declared array has no initialiser.
        """
        axes, initializers = WeightAxes.of(site), self.initializers_for(site)
        declared, sizes = self.factors_for(axes), self._all_sizes(axes)
        missing = [name for name in declared if name not in initializers]
        if missing or not declared:
            raise TypeError(f"{type(self).__name__} declares no initialiser for {missing or 'any factor'}: add it.")
        keys = jax.random.split(key, max(len(declared), 1))
        return {
            name: stacked(
                initializers[name], k, stack_sizes(text, axes), factor_axes.layer_shape(text, axes, sizes), dtype
            )
            for (name, text), k in zip(declared.items(), keys, strict=False)
        }

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        """Applies an update to a weight: by default it adds the declared networks.

        Arguments:
            update: the update, with this method.
            w: the weight, with the updates of earlier adapters.

        Raises:
            TypeError: if the method neither declares networks nor overrides `lower`.
        """
        if not self.networks:
            raise TypeError(
                f"{type(self).__name__} does not change the weight: declare `networks`, or override `lower`."
            )
        declared = self.factors_for(update.axes)
        for names in declarations.network_names(type(self).__name__, self.networks, declared):
            terms = [(update[name], declared[name]) for name in names]
            w = networks.add_network(w, update, terms, self.scale * update.scale)
        return w

    def _all_sizes(self, axes: WeightAxes) -> AxisSizes:
        return AxisSizes(self, self.sizes(axes))
