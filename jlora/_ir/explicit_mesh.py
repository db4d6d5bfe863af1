"""Meshes with `AxisType.Explicit` axes, where the type of an array says how it lies.

A program says it of every product of its own that leaves a choice. What jlora computes of factors the program does not
know of: it is left to the compiler, and typed like the array that it is added to.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, auto_axes

from jlora._ir.lazy import LazyArray
from jlora._tree.leaves import is_quantized


def explicit_axes(a: Any) -> tuple[Any, ...]:
    """The explicit axes of the mesh in an array's type; a quantised weight, made or to be made, has no such type."""
    if isinstance(a, LazyArray) or is_quantized(a):
        return ()
    mesh = jax.typeof(a).sharding.mesh
    return tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def under_auto_axes(fun: Callable[..., Any], like: Any, out: Any = None) -> Callable[..., Any]:
    """`fun` of trees of arrays, run where types say nothing.

    Arguments:
        fun: the function.
        like: an array of the program.
        out: shardings for the result, or for trees in it; that in the type of `like`, where they are left out.
    """
    axes = explicit_axes(like)
    return auto_axes(fun, axes=axes, out_sharding=out or jax.typeof(like).sharding) if axes else fun
