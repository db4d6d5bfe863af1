"""ConvLoRA: the original library's update of a convolution, a matrix product read as a kernel."""

import dataclasses
import math
from typing import Any, final

import jax
import jax.numpy as jnp

from jlora._interpreter.site import Site
from jlora._ir.weight import AdaptedWeight
from jlora.methods._base import Method, Update
from jlora.methods._common import axes as _axes
from jlora.methods._common import choices as _check
from jlora.methods._common import initializers as _start


@final
@dataclasses.dataclass(frozen=True)
class ConvLoRA(Method):
    """Adds to a convolution's kernel a matrix product, reshaped, as the library of LoRA's authors does.

        W + s reshape(B^T A^T, (out, in / groups, *window)),    A: (*stack, in k, rank k),    B: (*stack, rank k, out q)

    with s = alpha / rank, k the window's last size, q the product of its others over `groups`. Of a square window this
    is the library's own; in one and in three dimensions, where its reshape fails, the shapes fit so. Without groups
    the product is a LoRA of rank (rank k q), whose A has a block for each of the q rows that one out channel takes, and
    stays factored while that is cheaper. `LoRA` is the better choice for a new adapter. B starts at zero.

    Arguments:
        rank: the rank for one size of the window.
        alpha: the numerator of the scale; None makes the scale 1.
        groups: the convolution's `feature_group_count`.

    Raises:
        ValueError: from `jlora.init`, where the weight has no window, or where groups do not divide.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """

    rank: int = 8
    alpha: float | None = None
    groups: int = 1

    def unsupported_reason(self, site: Site) -> str:
        window = site.sizes("window") if not site.unsupported_reason else ()
        if site.unsupported_reason or not window:
            return site.unsupported_reason or "it is no convolution's kernel; LoRA adapts it"
        rows = math.prod((*site.sizes("out"), *window[:-1]))
        return f"groups {self.groups} do not divide its {rows} rows" if rows % self.groups else ""

    def _sizes(self, shape: tuple[int, ...], roles: tuple[str, ...]) -> tuple[int, int, int, tuple[int, ...]]:
        """in k, rank k, out q, and the window."""
        sizes = {r: tuple(n for n, x in zip(shape, roles, strict=True) if x == r) for r in ("in", "window", "out")}
        *others, last = sizes["window"]
        n_in = self.groups * math.prod(sizes["in"]) * last
        return n_in, self.rank * last, math.prod((*sizes["out"], *others)) // self.groups, sizes["window"]

    def init(self, key: jax.Array, site: Site, dtype: Any, base: jax.Array | None) -> dict[str, jax.Array]:
        stack = site.sizes("stack")
        n_in, rank, n_out, _ = self._sizes(site.shape, site.roles)
        a = _start.stacked(_start.kaiming, key, stack, (n_in, rank), dtype)
        return {"a": a, "b": jnp.zeros((*stack, rank, n_out), dtype)}

    def lower(self, update: Update, w: AdaptedWeight) -> AdaptedWeight:
        stack, inner, outer = _axes.letters(w, update.roles)
        channels, window = _axes.within(w, update.roles)
        scale = _check.scale(self.alpha, self.rank, False) * update.scale
        _, rank, _, sizes = self._sizes(update.shape, update.roles)
        a, b, count = update["a"], update["b"], math.prod(sizes[:-1])
        n_in, n_out = w.size(inner), w.size(outer)
        if self.groups > 1 or rank * count * (n_in + n_out) >= n_in * n_out:
            product = jnp.matmul(b.mT, a.mT, precision=jax.lax.Precision.HIGHEST)
            term = stack + outer + channels + window
            return _axes.add(w, [(product.reshape([w.size(c) for c in term]), term)], {}, scale)
        blocks = jnp.eye(count, dtype=a.dtype)[:, None, :, None] * a[..., None, :, None, :]
        ups = jnp.moveaxis(b.reshape(*b.shape[:-1], n_out, count), -1, -3)
        one, two = _axes.ranks(w, 2)
        blocks = blocks.reshape([*(w.size(c) for c in stack + channels + window), count, rank])
        pairs = [(blocks, stack + channels + window + one + two), (ups, stack + one + two + outer)]
        return _axes.add(w, pairs, {one: count, two: rank}, scale)
