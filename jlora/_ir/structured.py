"""Updates with a structure: a small array that determines a matrix as large as the weight, linearly.

Added to the base as a dense matrix, such an update costs the gradient of the whole weight, x^T g. A structure knows a
product with the matrix that does not materialise it, and so a gradient that does not need x^T g.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax

from jlora._ir.algebra import align_axes, take_picks
from jlora._ir.weight import AdaptedWeight, TensorNetwork


class Structure(abc.ABC):
    """A linear map from a small array theta to a matrix M(theta): (in, out), of static sizes.

    A subclass is a frozen dataclass of static fields. Both functions are linear in theta. What else M depends on, and
    is not static, is in further arrays, which are not trained: both functions get them after theta.
    """

    @abc.abstractmethod
    def matrix(self, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        """M(theta), `(in, out)`, in the dtype of theta or a wider one."""

    @abc.abstractmethod
    def apply(self, x: jax.Array, theta: jax.Array, *constants: jax.Array) -> jax.Array:
        """`x M(theta)`, without M.

        Arguments:
            x: the activation, (rows, in).
            theta: the array.
            constants: the further arrays.

        Returns:
            (rows, out), in the dtype of x or a wider one.
        """

    @abc.abstractmethod
    def apply_flops(self, rows: int) -> float:
        """The FLOPs of `apply` for so many rows."""

    @property
    def matrix_flops(self) -> float:
        """The FLOPs of `matrix`."""
        return 0

    @property
    def is_branch(self) -> bool:
        """Whether `apply` serves the forward pass too if sizes are symbolic, and not the gradient of theta alone."""
        return True


_ARRAYS = ("factors", "key", "picks")
_STATIC = (field.name for field in dataclasses.fields(TensorNetwork) if field.name not in _ARRAYS)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=list(_ARRAYS),
    meta_fields=[*_STATIC, "structure", "inputs", "outputs", "may_round"],
)
@dataclasses.dataclass(frozen=True)
class StructuredNetwork(TensorNetwork):
    """The network `scale * M(theta)`: theta is its first factor, and the constants of M are the others.

    Rules that know nothing of it get `with_matrices`, in which it is a network with the factor M(theta).

    Arguments:
        structure: M.
        inputs, outputs: the indices of the weight that the axes of M run along, major first.
        may_round: whether the sum with a weight of 16 bits may be chosen, which rounds the update with the weight.
    """

    structure: Structure | None = None
    inputs: str = ""
    outputs: str = ""
    may_round: bool = False

    def per_layer(self, fn: Callable[..., jax.Array], stack: str, *arrays: tuple[jax.Array, str]) -> jax.Array:
        """`fn(*arrays, theta, *constants)`, mapped over the stack.

        Arguments:
            fn: a function of arrays of one layer.
            stack: indices of the stack, which are the first axes of the result.
            arrays: arrays with the indices of their first axes, in the order of `stack`; those that an array lacks are
                not mapped.
        """
        pairs = [
            (align_axes(array, term, "".join(sorted(term, key=lambda c: (c not in stack, stack.find(c))))), term)
            for array, term in zip(self.factors, self.terms, strict=True)
        ]
        for c in reversed(stack):
            fn = jax.vmap(fn, [0 if c in names else None for _, names in (*arrays, *pairs)])
        return fn(*(array for array, _ in (*arrays, *pairs)))

    def matrix(self, labels: str, sizes: Mapping[str, int]) -> TensorNetwork:
        """The same network with the matrix as its factor.

        Arguments:
            labels: the indices of the weight.
            sizes: of the indices.
        """
        assert self.structure is not None
        assert set(self.inputs + self.outputs) <= set(labels)
        stack = "".join(c for c in labels if any(c in term for term in self.terms))
        value = self.per_layer(self.structure.matrix, stack)
        term = stack + self.inputs + self.outputs
        return TensorNetwork((value.reshape([sizes[c] for c in term]),), (term,), self.scale)


def structured(f: AdaptedWeight) -> list[StructuredNetwork]:
    """The structured networks of a weight."""
    return [n for n in f.networks if isinstance(n, StructuredNetwork)]


def with_matrices(
    f: AdaptedWeight, keeps: Callable[[StructuredNetwork], bool] = lambda network: False
) -> AdaptedWeight:
    """The weight with the matrix of every structured network as its factor.

    Arguments:
        f: the weight.
        keeps: which structured networks stay.
    """
    if all(map(keeps, structured(f))):
        return f
    f = take_picks(f)
    networks = (
        n.matrix(f.labels, f.sizes) if isinstance(n, StructuredNetwork) and not keeps(n) else n for n in f.networks
    )
    return dataclasses.replace(f, networks=tuple(networks))
