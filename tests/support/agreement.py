"""The law as a check: an adapted program against the base program on merged parameters, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

F32 = 2e-5  # relative to the largest entry of a tree


def adapter_for(
    sites: jlora.Sites, targets: Any, rng: np.random.Generator, *, positive: bool = False, size: float = 1.0
) -> Any:
    """An adapter as `jlora.init` makes it, with numbers other than zero, up to `size`, in all of its factors."""
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, targets))
    return jax.tree.map(lambda leaf: size * random(rng, leaf.shape, leaf.dtype, positive=positive), shapes)


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, *, positive: bool = False) -> jax.Array:
    """Numbers in +-[0.25, 1), never zero; with `positive`, without signs, so that no sum cancels. Integers: 1 to 4."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(1, 5, shape).astype(dtype))
    values = rng.uniform(0.25, 1, shape)
    signs = 1 if positive else rng.choice([-1.0, 1.0], shape)
    return jnp.asarray(np.asarray(values * signs, dtype))


def sides(f: Callable[..., Any], params: Any, adapter: Any, *args: Any, on_dense: Any = "allow", **kwargs: Any) -> Any:
    """Values and gradients of both sides of the law: `(adapted, merged)`, each `(output, gradient)`, both jitted.

    Keyword arguments, and leaves of `params` that are no arrays, are static. Gradients are those of a random projection
    of all floating-point outputs.
    """

    def adapted(params: Any, adapter: Any, *args: Any) -> Any:
        return jlora.adapt(f, on_dense=on_dense)(params, adapter, *args, **kwargs)

    def merged(params: Any, adapter: Any, *args: Any) -> Any:
        return f(jlora.merge(params, adapter), *args, **kwargs)

    def side(g: Callable[..., Any], params: Any, adapter: Any, args: Any) -> Any:
        def loss(adapter: Any) -> Any:
            out = g(params, adapter, *args)
            return project(out), out

        return jax.grad(loss, has_aux=True)(adapter)[::-1]

    leaves, treedef = jax.tree.flatten(params)
    arrays = {k: leaf for k, leaf in enumerate(leaves) if hasattr(leaf, "shape")}

    def both(arrays: dict[int, jax.Array], adapter: Any, args: Any) -> Any:
        params = jax.tree.unflatten(treedef, [arrays.get(k, leaf) for k, leaf in enumerate(leaves)])
        return side(adapted, params, adapter, args), side(merged, params, adapter, args)

    return jax.jit(both)(arrays, adapter, args)


def project(out: Any) -> jax.Array:
    """A number that depends on every floating-point entry, each with a weight of its own in [0.5, 1.5)."""
    rng = np.random.default_rng(7)
    total = jnp.zeros(())
    for leaf in jax.tree.leaves(out):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            weights = jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
            total = total + jnp.sum(leaf.astype(jnp.float32) * weights)
    return total


def difference(left: Any, right: Any) -> float:
    """The largest difference of two trees, relative to the largest entry of the right one; infinite where they misfit.

    Not-a-number counts as equal only in the same place on both sides; integers and keys are equal or infinitely apart.
    """
    assert jax.tree.structure(left) == jax.tree.structure(right)
    gap, top = 0.0, 0.0
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not jnp.issubdtype(a.dtype, jnp.floating):
            if not np.array_equal(a, b):
                return np.inf
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        seen = ~np.isnan(b)
        if not np.array_equal(~np.isnan(a), seen) or not np.isfinite(a[seen]).all():
            return np.inf
        gap = max(gap, np.abs(a[seen] - b[seen]).max(initial=0))
        top = max(top, np.abs(b[seen]).max(initial=0))
    return float(gap / top) if top else float(gap)


def check_law(f: Callable[..., Any], params: Any, adapter: Any, *args: Any, bound: float = F32, **kwargs: Any) -> None:
    """Asserts `adapt(f)(params, adapter, *args) == f(merge(params, adapter), *args)`, values and gradients."""
    (out, grads), (expected, expected_grads) = sides(f, params, adapter, *args, **kwargs)
    assert difference(out, expected) <= bound
    assert difference(grads, expected_grads) <= bound


def close(a, b, tolerance=2e-5):
    """Equal up to the tolerance, in units of the largest entry."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * np.abs(y).max()
