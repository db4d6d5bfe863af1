"""Quantised bases: which weights of a model are quantised, and in which format."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora._interpreter.context import matrix_side
from jlora._interpreter.site import Site
from jlora._ir.explicit_mesh import explicit_axes, type_sharding, under_auto_axes
from jlora._trace.sites import Sites, check_sites
from jlora._tree.leaves import is_quantized
from jlora._tree.paths import flatten, named_leaves
from jlora._tree.patterns import select_by_pattern
from jlora._tree.pieces import part_shardings
from jlora.quantized import nf4

Format = str | Callable[[jax.Array, Site], Any]


def quantize(params: Any, sites: Sites, targets: Mapping[str, Format | None]) -> Any:
    """Rounds weights to fewer bits: a frozen base that takes an eighth to a half of the memory.

    The result goes wherever parameters go (`trace`, `init`, `adapt`, `merge`, `save`). In an adapted program the op
    that consumes a weight dequantises it, and its backward pass dequantises it again, one layer at a time: there is
    never a float copy of the model. `merge` returns plain weights; with `requantize=True` they are quantised again.

    Arguments:
        params: the base parameters; they are not changed.
        sites: from `jlora.trace`, for the axes that the program contracts.
        targets: patterns (`re.fullmatch` on the path; the first match decides), each with a format, or None to exclude:

            - `"nf4"`: 4-bit NormalFloat in blocks of 64 along the last contracted axis (of a lookup table along its
              rows), with 8-bit scales;
            - `"int8"`, `"fp8"` (e4m3): one scale for each output, or row of a table; needs qwix;
            - `"int4"`: one scale for each 32 entries along that axis; needs qwix;
            - a function of the weight and its site.

    Returns:
        the parameters, with the chosen weights quantised.

    Raises:
        TypeError: if `sites` is not from `jlora.trace`, or `targets` is not a dict.
        ValueError: if a pattern matches nothing or is shadowed by an earlier one, a format is unknown, or a weight is
            not a matrix or is already quantised.
        ImportError: if qwix is needed and not installed.

    Example:
        base = jlora.quantize(params, jlora.trace(apply, params, x), {".*/kernel": "nf4"})

    Dettmers et al. 2023, arXiv:2305.14314.
    """
    check_sites(sites)
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets is a dict from patterns to formats, such as {{'.*/kernel': 'nf4'}}, not {targets!r}.")
    chosen = select_by_pattern(sites, targets)
    leaves = []
    for path, leaf in named_leaves(params):
        format_ = chosen.get(path)
        leaves.append(leaf if format_ is None else _quantize_leaf(leaf, sites[path], format_))
    return jax.tree.unflatten(flatten(params)[1], leaves)


def _quantize_leaf(leaf: Any, site: Site, format_: Format) -> Any:
    if is_quantized(leaf):
        raise ValueError(f"{site.path} is already quantised: dequantise it first, or exclude it with None.")
    if site.unsupported_reason:
        raise ValueError(
            f"{site.path} {site.shape} cannot be quantised: {site.unsupported_reason}. Exclude it with None."
        )
    if isinstance(format_, str) and format_ not in FORMATS:
        raise ValueError(
            f"{format_!r} is not a format for {site.path}: use {', '.join(FORMATS)}, or a function of weight and site."
        )
    run = FORMATS[format_] if isinstance(format_, str) else format_
    return _in_place(lambda weight: run(weight, site), leaf)


def _in_place(run: Callable[[jax.Array], Any], weight: jax.Array) -> Any:
    """`run(weight)`, compiled; on a mesh with Explicit axes the parts are placed as the weight is, if blocks fit."""
    if not explicit_axes(weight):
        return jax.jit(run)(weight)
    sharding = type_sharding(weight)
    shapes = jax.eval_shape(under_auto_axes(run, weight, sharding.update(spec=PartitionSpec())), weight)
    return jax.jit(under_auto_axes(run, weight, part_shardings(shapes, sharding)))(weight)


def _nf4(weight: jax.Array, site: Site) -> Any:
    return nf4.quantize(weight, _block_axis(site))


def _qwix(weight: jax.Array, site: Site, qtype: Any, block: int | None = None) -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError(
            f"{site.path}: int8, int4 and fp8 need qwix, which is not installed: pip install 'jlora[quant]'."
        ) from None
    last = _block_axis(site)
    tiled = {} if block is None or weight.shape[last] % block else {last: block}
    shared = {axis for axis, role in enumerate(site.roles) if matrix_side(role) == matrix_side(site.roles[last])}
    channelwise = [axis for axis in range(weight.ndim) if axis not in shared]
    return qwix.quantize(weight, qtype, channelwise_axes=channelwise, tiled_axes=tiled)


def _block_axis(site: Site) -> int:
    """The last axis that the program contracts; of a lookup table the last axis of a row."""
    block_role = "out" if site.is_lookup else "in"
    return max(axis for axis, role in enumerate(site.roles) if matrix_side(role) == block_role)


FORMATS: dict[str, Callable[[jax.Array, Site], Any]] = {
    "nf4": _nf4,
    "int8": functools.partial(_qwix, qtype=jnp.int8),
    "int4": functools.partial(_qwix, qtype=jnp.int4, block=32),
    "fp8": functools.partial(_qwix, qtype=jnp.float8_e4m3fn),
}
