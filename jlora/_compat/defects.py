"""Ways around defects of single releases, gated by the version."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from jlora._compat.devices import is_for_cpu
from jlora._compat.jaxprs import is_tracer


def row_major_gradient(x: jax.Array) -> jax.Array:
    """A Fourier transform's result with a row-major gradient: on the CPU XLA's transform fails on other layouts."""
    fails = jax.__version_info__ < (0, 13) and jax.default_backend() == "cpu"
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape) if fails else x


def row_major(x: jax.Array) -> jax.Array:
    """An array in a row-major layout: XLA lays out a new axis of size one in another order, and a loop copies that."""
    is_copied = is_tracer(x) and is_for_cpu(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if is_copied else x


def one_by_one(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun`, whose `vmap` is a loop: on CPUs of few cores two batches of LAPACK calls wait for each other for ever."""

    @functools.wraps(fun)
    def call(*args: Any) -> Any:
        waits = jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu"
        return (jax.custom_batching.sequential_vmap(fun) if waits else fun)(*args)

    return call
