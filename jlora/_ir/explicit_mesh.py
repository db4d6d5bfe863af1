"""Meshes with `AxisType.Explicit` axes, on which the type of an array has its sharding.

On Explicit meshes a program annotates its operations. It cannot annotate those that jlora inserts: they run with the
axes set to Auto, and take the sharding of the array that they are added to.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import auto_axes

from jlora._ir.lazy import LazyArray
from jlora._tree import leaves


def type_sharding(a: Any) -> Any:
    """The sharding in an array's type; of a quantised or lazy weight that of the array which it stands for."""
    if isinstance(a, LazyArray):
        return a.sharding
    return leaves.sharding(a) if leaves.is_quantized(a) else jax.typeof(a).sharding


def explicit_axes(a: Any) -> tuple[Any, ...]:
    """The Explicit axes of the mesh in an array's type."""
    return leaves.explicit_axes(type_sharding(a))


def under_auto_axes(fun: Callable[..., Any], like: Any, out: Any = None) -> Callable[..., Any]:
    """Runs `fun` with the mesh's Explicit axes switched to Auto.

    Arguments:
        fun: a function of pytrees of arrays.
        like: an array of the program, whose type has the mesh.
        out: shardings of the result, or of its subtrees; by default that in the type of `like`.
    """
    axes = explicit_axes(like)
    return auto_axes(fun, axes=axes, out_sharding=out or type_sharding(like)) if axes else fun
