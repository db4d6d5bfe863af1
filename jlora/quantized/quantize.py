"""Quantised bases: which weights of a model, and in how many bits."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._adapter.adapt import choose_paths
from jlora._interpreter.context import matrix_side
from jlora._interpreter.site import Site
from jlora._trace.sites import Sites
from jlora._tree.leaves import is_quantized
from jlora._tree.paths import flatten, named_leaves
from jlora.quantized import nf4

Form = str | Callable[[jax.Array, Site], Any]


def quantize(params: Any, sites: Sites, targets: Mapping[str, Form | None]) -> Any:
    """Rounds weights to fewer bits: a frozen base that takes an eighth to a half of the memory.

    The result goes wherever parameters go (`trace`, `init`, `adapt`, `merge`, `save`). An adapted program makes such a
    weight anew in every product that consumes it, and again for that product's gradient, a layer at a time: there is
    never a float copy of the model. `merge` makes plain weights of them all, or, with `requantize=True`, none.

    Arguments:
        params: the base parameters; they stay as they are.
        sites: from `jlora.trace`, for the axes that the program contracts.
        targets: patterns (`re.fullmatch` on the path; the first that matches decides) with a form, None to exclude:
            `"nf4"`, 4-bit NormalFloat in blocks of 64 along the last contracted axis (in a table along its rows), the
            scales in 8 bits; `"int8"` and `"fp8"` (e4m3), a scale for every output (or row); `"int4"`, a scale for
            every 32 entries along that axis (these three need qwix); or a function of a weight and its site.

    Raises:
        ValueError: where a pattern matches nothing or never decides, where a form is unknown, where a weight is no
            matrix or quantised already.
        ImportError: where qwix is needed and missing.

    Dettmers et al. 2023, arXiv:2305.14314.
    """
    chosen = choose_paths(sites, targets)
    leaves = named_leaves(params)
    new = []
    for path, leaf in leaves:
        form = chosen.get(path)
        new.append(leaf if form is None else _rounded(leaf, sites[path], form))
    return jax.tree.unflatten(flatten(params)[1], new)


def _rounded(leaf: Any, site: Site, form: Form) -> Any:
    if is_quantized(leaf):
        raise ValueError(f"{site.path} is quantised already: dequantise it first, or exclude it with None.")
    if site.unsupported_reason:
        raise ValueError(
            f"{site.path} {site.shape} cannot be quantised: {site.unsupported_reason}. Exclude it with None."
        )
    if isinstance(form, str) and form not in FORMS:
        raise ValueError(f"{form!r} is no form for {site.path}: {', '.join(FORMS)}, or a function of weight and site.")
    run = FORMS[form] if isinstance(form, str) else form
    return jax.jit(lambda weight: run(weight, site))(leaf)


def _nf4(weight: jax.Array, site: Site) -> Any:
    return nf4.quantize(weight, _blocked(site))


def _qwix(weight: jax.Array, site: Site, qtype: Any, block: int | None = None) -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError("This form is qwix's: pip install 'jlora[quant]'.") from None
    last = _blocked(site)
    tiled = {} if block is None or weight.shape[last] % block else {last: block}
    shared = {axis for axis, role in enumerate(site.roles) if matrix_side(role) == matrix_side(site.roles[last])}
    apart = [axis for axis in range(weight.ndim) if axis not in shared]
    return qwix.quantize(weight, qtype, channelwise_axes=apart, tiled_axes=tiled)


def _blocked(site: Site) -> int:
    """The last axis that products contract, or of a table whose rows are looked up the last within a row."""
    wanted = "out" if site.is_lookup else "in"
    return max(axis for axis, role in enumerate(site.roles) if matrix_side(role) == wanted)


FORMS: dict[str, Callable[[jax.Array, Site], Any]] = {
    "nf4": _nf4,
    "int8": functools.partial(_qwix, qtype=jnp.int8),
    "int4": functools.partial(_qwix, qtype=jnp.int4, block=32),
    "fp8": functools.partial(_qwix, qtype=jnp.float8_e4m3fn),
}
