"""FRoD: generalised singular values of a weight, and a few entries beside them, between frozen matrices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import final

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import random_matrices
from jlora.methods._common.digits import traced_digits
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import choice, fraction, integer, nonzero, text
from jlora.methods._common.linalg import inverse
from jlora.methods._common.matrices import as_matrix, in_out, too_large_to_number
from jlora.methods._common.networks import add_matrix
from jlora.methods._common.sparse_structures import Placed


@final
@dataclasses.dataclass(frozen=True)
class FRoD(Method):
    """Trains the generalised singular values of a weight, and a few entries beside their diagonal: a dense update.

        W + V (S + diag(l - l0)) U,    W = V diag(l0) U,    S: zero except for the entries s, off the diagonal

    V: (in, in) is a basis, in general not orthogonal, that weights of one kind share. U: (*stack, in, out) has rows of
    length 1. Both, l0 and the random places of the entries are frozen: `jlora.init(...,
    params=params)`. The entries start at zero, and l at l0. V is the basis of the higher-order generalised singular
    value decomposition of all weights that share it, (out, in) as torch has them:

        [W_1; ...; W_k] = [Q_1; ...; Q_k] R,    V = R^T E,    E the eigenvectors of mean_i (Q_i^T Q_i + ridge I)^-1

    Of one weight alone V is R^T. If the weights have fewer rows than columns together, V has their right singular
    vectors, and any basis of the rest.

    V takes in^2 numbers, and U as many as the weight. In units of 4 T in out, the FLOPs of the base for T rows, a step
    adds 1/2 + (in / T) (1 + min(in, out) / out) to the base: the gradient of the whole weight, and products with V and
    U of weights alone. Products of V and U with activations add 1 + in / out to the base, or in / out without it, and
    the gradients of S and l.

    Arguments:
        density: the number of trained entries, as a share of in^2, in [0, 1).
        ridge: keeps the inverse finite if weights that share V are alike.
        shared: who shares V and the places: the layers of a stack, all weights with an equal method ("weights"), or
            "none".
        group: a name: weights whose methods differ in it do not share.
        dropout: the dropout rate of the update's input, in [0, 1).
        peft_modules: how many modules of torch share V in the file that `jlora.peft.load` has read; 0 if jlora has
            computed V. PEFT computes V again when it loads a file, so `jlora.peft.save` writes no V of jlora's.

    Raises:
        ValueError: from `jlora.init`, if weights of different in sizes would share V, or if `peft_modules` is set.

    Example:
        kinds = ("query", "key", "value")
        targets = {f".*/{kind}/kernel": jlora.FRoD(shared="weights", group=kind) for kind in kinds}

    Wan et al. 2026, FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence,
    arXiv:2512.23485.
    """

    density: float = fraction(0.01)
    ridge: float = nonzero(1e-3)
    shared: str = choice("layers", "weights", "none")
    group: str = text("")
    dropout: float = fraction(0.0)
    peft_modules: int = integer(0)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("l0", "u", "v", "place")

    @property
    def shared_arrays(self) -> tuple[str, ...]:
        return ("v", "place") if self.shared == "weights" else ()

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        n_in = 0 if site.unsupported_reason else in_out(site)[0]
        if site.unsupported_reason or n_in > 1:
            return site.unsupported_reason or too_large_to_number(n_in, n_in)
        return "it has one input, and so no entries off the diagonal"

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        stack = "*stack " if self.shared == "none" else ""
        return {
            "l": "*stack column",
            "s": "*stack entries",
            "l0": "*stack column",
            "u": "*stack column *out",
            "v": "row column" if self.shared == "weights" else f"{stack}*in column",
            "place": f"{stack}entries digits",
        }

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        n = axes.count("*in")
        entries = min(max(int(n * n * self.density), 1 if self.density else 0), n * n - n)
        return {"row": n, "column": n, "entries": entries, "digits": 4}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        if self.peft_modules:
            raise ValueError(
                f"{site.path}: {self} is the method of an update that jlora.peft.load has read. Use peft_modules=0 "
                "for a new one."
            )
        weight, axes = as_matrix(base, site.roles), WeightAxes.of(site)
        shapes, n_in = self.shapes(axes), weight.shape[-2]
        places = random_places(key, n_in, shapes["place"][-2])
        arrays = {"s": jnp.zeros(shapes["s"], dtype), "place": jnp.broadcast_to(places, shapes["place"])}
        if self.shared == "weights":  # V depends on all of them, and U on V: see `share`
            length = jnp.ones(shapes["l"])
            arrays |= {"v": jnp.eye(n_in), "l": length, "l0": length, "u": weight}
        elif self.shared == "layers":
            arrays |= _decomposed(weight, self.ridge)
        else:
            flat = weight.reshape(-1, *weight.shape[-2:])
            layers = [_decomposed(layer, self.ridge) for layer in flat]
            arrays |= {name: jnp.stack([layer[name] for layer in layers]) for name in layers[0]}
        return {name: arrays[name].reshape(shape).astype(dtype) for name, shape in shapes.items()}

    def share(self, updates: Mapping[str, Update]) -> Mapping[str, Mapping[str, jax.Array]]:
        sizes = {path: update.axes.count("*in") for path, update in updates.items()}
        (first, size), *others = sizes.items()
        for path, other in others:
            if other != size:
                raise ValueError(
                    f"{path} has {other} inputs and {first} has {size}, so they cannot share V by {self}. Give the "
                    'weights of each kind a method of their own, jlora.FRoD(shared="weights", group=...).'
                )
        weights = {path: update.joined("u") for path, update in updates.items()}
        flat = [layer for weight in weights.values() for layer in weight.reshape(-1, *weight.shape[-2:])]
        v, products = joint_basis(flat, self.ridge)
        out, start = {}, 0
        for path, update in updates.items():
            stop = start + math.prod(weights[path].shape[:-2])
            lengths, u = _rows(jnp.stack(products[start:stop]))
            arrays = {"l": lengths, "l0": lengths, "u": u, "v": v, "place": updates[first].frozen["place"]}
            like = update.factors | update.frozen
            out[path] = {name: a.reshape(like[name].shape).astype(like[name].dtype) for name, a in arrays.items()}
            start = stop
        return out

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        n_in, n_out = update.axes.count("*in"), update.axes.count("*out")
        entries = Placed(n_in, n_in, self.sizes(update.axes)["entries"])
        sparse = jnp.vectorize(entries.matrix, signature="(e),(e,d)->(n,n)")
        diagonal = jnp.vectorize(jnp.diag, signature="(n)->(n,n)")
        place = jnp.broadcast_to(update["place"], (*update["s"].shape, update["place"].shape[-1]))
        middle = sparse(update["s"], place) + diagonal(update["l"] - update["l0"])
        v, u = jnp.broadcast_to(update.joined("v"), middle.shape), update.joined("u")
        # Three large products: at JAX's default precision, as products of activations are, and not at the highest.
        matrix = v @ (middle @ u) if n_out <= n_in else (v @ middle) @ u
        return add_matrix(w, update, matrix, update.scale)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def random_places(key: jax.Array, n: int, count: int) -> jax.Array:
    """Places off the diagonal of a matrix (n, n), as digits of `column * n + row`: (count, 4)."""
    flat = random_matrices.scattered(key, count, n * (n - 1))
    column, row = flat // (n - 1), flat % (n - 1)
    return traced_digits(column * n + row + (row >= column).astype(row.dtype), 4)


def joint_basis(weights: Sequence[jax.Array], ridge: float) -> tuple[jax.Array, list[jax.Array]]:
    """V of the decomposition, and `V^-1 W` of every weight.

    Arguments:
        weights: (in, out) each, with one in size.
        ridge: added to the diagonal before the inverse.
    """
    n_in, rows = weights[0].shape[0], [weight.shape[1] for weight in weights]
    stacked = jnp.concatenate([weight.T for weight in weights])
    if len(stacked) < n_in:
        v = jnp.linalg.svd(stacked, full_matrices=True)[2].T
        return v, [_matmul(v.T, weight) for weight in weights]
    q, r = jnp.linalg.qr(stacked)
    if len(weights) == 1:  # Q^T Q = I has any eigenvectors
        return r.T, [q.T]
    parts, start = [], 0
    for count in rows:
        parts.append(q[start : start + count])
        start += count
    identity = ridge * jnp.eye(n_in, dtype=q.dtype)
    with jax.default_matmul_precision("highest"):
        vectors = jnp.linalg.eigh(sum(inverse(part.T @ part + identity) for part in parts) / len(parts))[1]
    return _matmul(r.T, vectors), [_matmul(part, vectors).T for part in parts]  # V^-1 W = E^T R^-T (R^T Q^T)


def _decomposed(weight: jax.Array, ridge: float) -> dict[str, jax.Array]:
    """The frozen arrays of one weight, (*stack, in, out), whose layers share V, and l."""
    v, products = joint_basis(list(weight.reshape(-1, *weight.shape[-2:])), ridge)
    lengths, u = _rows(jnp.stack(products))
    return {"l": lengths, "l0": lengths, "u": u, "v": v}


def _rows(product: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lengths of the rows, and the rows of length 1; rows that are rounding errors are zero."""
    lengths = jnp.linalg.norm(product, axis=-1)
    is_row = lengths > 1e-5 * lengths.max(axis=-1, keepdims=True)
    lengths = jnp.where(is_row, lengths, 0)
    return lengths, product / jnp.where(is_row, lengths, jnp.inf)[..., None]
