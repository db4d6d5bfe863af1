"""OSF: trains the last singular triples of a weight, orthogonally to the others."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, final

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import fraction, positive_integer
from jlora.methods._common.matrices import as_matrix, rank_too_high
from jlora.methods._common.networks import add_network


@final
@dataclasses.dataclass(frozen=True)
class OSF(Method):
    """Trains the last singular triples of a weight and keeps its leading ones, so that earlier tasks are not forgotten.

        W - U0 diag(s0) V0 + U diag(s) V,    U: (*stack, *in, rank),    s: (*stack, rank),    V: (*stack, rank, *out)

    U0, s0 and V0 are the last triples at the start, and frozen: `jlora.init(..., params=params)`. The gradients of U
    and V have no part in the space of the leading singular vectors:

        dU - H H^T dU,    dV - dV K^T K,    H and K the leading left and right singular vectors

    If in <= out, I - H H^T is U0 U0^T, and likewise for V; the other of H and K is kept beside the factors, and takes
    about as many numbers as the weight.

    Arguments:
        rank: how many triples are trained. The paper keeps more leading ones the more a layer matters; PEFT's
            `effective_rank` is the smaller side minus this rank, half of that side by default.
        dropout: the dropout rate of the branch's input, in [0, 1).

    Raises:
        ValueError: if a hyper-parameter is not valid, and from `jlora.init`, if the rank leaves nothing of the weight.

    Example:
        jlora.init(key, sites, jlora.OSF(rank=16), params=params)

    Nayak et al. 2025, Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning,
    arXiv:2504.07097.
    """

    rank: int = positive_integer(16)
    dropout: float = fraction(0.0)

    @property
    def frozen(self) -> tuple[str, ...]:
        return ("u0", "s0", "v0", "h", "k")

    @property
    def init_needs_weight(self) -> bool:
        return True

    def unsupported_reason(self, site: Site) -> str:
        if reason := site.unsupported_reason or rank_too_high(site, self.rank + 1):
            return reason.replace(f"rank {self.rank + 1} is above", f"rank {self.rank} is not below")
        return ""

    def factors_for(self, axes: WeightAxes) -> Mapping[str, str]:
        triple = {"u": "*stack *in triple", "s": "*stack triple", "v": "*stack triple *out"}
        return triple | {f"{name}0": declared for name, declared in triple.items()} | _leading(axes)

    def sizes(self, axes: WeightAxes) -> Mapping[str, int]:
        return {"triple": self.rank, "kept": min(axes.count("*in"), axes.count("*out")) - self.rank}

    def init(self, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None) -> dict[str, jax.Array]:
        assert base is not None
        u, s, vt = jnp.linalg.svd(as_matrix(base, site.roles), full_matrices=False)
        last, first = slice(-self.rank, None), slice(None, -self.rank)
        arrays = {"u": u[..., last], "s": s[..., last], "v": vt[..., last, :]}
        arrays |= {f"{name}0": array for name, array in arrays.items()}
        arrays |= {"h": u[..., first], "k": vt[..., first, :]}
        return {name: arrays[name].astype(dtype) for name in self.factors_for(WeightAxes.of(site))}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        u, v = _projected(update, "u", "h"), _projected(update, "v", "k", transposed=True)
        declared = ("*stack *in triple", "*stack triple *out")
        at_start = update.joined("u0") * update["s0"][..., None, :], update.joined("v0")
        w = add_network(w, update, list(zip((u * update["s"][..., None, :], v), declared, strict=True)), update.scale)
        return add_network(w, update, list(zip(at_start, declared, strict=True)), -update.scale)


def _leading(axes: WeightAxes) -> dict[str, str]:
    """The leading singular vectors that the last ones do not give: those of the larger side."""
    n_in, n_out = axes.count("*in"), axes.count("*out")
    leading = {"h": "*stack *in kept"} if n_in > n_out else {}
    return leading | ({"k": "*stack kept *out"} if n_out > n_in else {})


def _projected(update: Update, name: str, leading: str, *, transposed: bool = False) -> jax.Array:
    """A factor whose gradient has no part in the space of the leading singular vectors."""
    is_kept = leading in update.frozen
    factor, basis = update.joined(name), update.joined(leading if is_kept else f"{name}0")
    if transposed:
        return _orthogonal_gradient(factor.mT, basis.mT, is_kept).mT
    return _orthogonal_gradient(factor, basis, is_kept)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _orthogonal_gradient(factor: jax.Array, basis: jax.Array, is_complement: bool) -> jax.Array:
    """The factor itself; its derivative is projected on the space of the basis, or on the complement of that space."""
    return factor


@_orthogonal_gradient.defjvp
def _jvp(is_complement: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (factor, basis), (tangent, _) = primals, tangents
    basis = basis.astype(factor.dtype)
    with jax.default_matmul_precision("highest"):
        inside = basis @ (basis.mT @ tangent)
    return factor, tangent - inside if is_complement else inside
