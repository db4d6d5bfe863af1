"""Meshes with `AxisType.Explicit` axes, on which the type of an array has its sharding.

On Explicit meshes a program annotates its operations. It cannot annotate those that jlora inserts: they run with the
axes set to Auto, and take the sharding of the array that they are added to.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, auto_axes

from jlora._ir.lazy import LazyArray
from jlora._tree.leaves import is_quantized


def explicit_axes(a: Any) -> tuple[Any, ...]:
    """The Explicit axes of the mesh in an array's type; a quantised or lazy weight has no such type."""
    if isinstance(a, LazyArray) or is_quantized(a):
        return ()
    mesh = jax.typeof(a).sharding.mesh
    return tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def under_auto_axes(fun: Callable[..., Any], like: Any, out: Any = None) -> Callable[..., Any]:
    """Runs `fun` with the mesh's Explicit axes switched to Auto.

    Arguments:
        fun: a function of pytrees of arrays.
        like: an array of the program, whose type has the mesh.
        out: shardings of the result, or of its subtrees; by default that in the type of `like`.
    """
    axes = explicit_axes(like)
    return auto_axes(fun, axes=axes, out_sharding=out or jax.typeof(like).sharding) if axes else fun
