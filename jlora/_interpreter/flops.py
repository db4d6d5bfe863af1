"""FLOPs of products and convolutions, from shapes alone."""

import functools
import math
from typing import Any

from jlora import _compat
from jlora._compat import Eqn
from jlora._ops.treat_as import TREAT_AS


def flops(jaxpr: Any) -> float:
    """FLOPs of all products and convolutions of an open or closed jaxpr.

    The body of a `scan` counts once for each step, that of a `while` loop once, and a `cond` as its largest branch.
    """
    return sum(map(equation_flops, _compat.open_jaxpr(jaxpr)[0].eqns))


def equation_flops(eqn: Eqn) -> float:
    """FLOPs of one equation: of a product or a convolution, or of the programs inside it."""
    name = eqn.primitive.name
    if name in _FORMULAS:
        return _FORMULAS[name](eqn)
    if name == TREAT_AS:  # the kernel and its plain twin compute the same
        return flops(eqn.params["plain"])
    if name == "cond":
        return functools.reduce(_compat.max_dim, (flops(branch) for branch, _ in _compat.cond_params(eqn).branches))
    inner = sum(flops(body) for body, _ in _compat.bodies(eqn))
    return inner * (_compat.scan_params(eqn).length if name == "scan" else 1)


def _dot_general(eqn: Eqn) -> float:
    return _product(eqn, eqn.params["dimension_numbers"])


def _ragged_dot_general(eqn: Eqn) -> float:
    return _product(eqn, eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers)


def _product(eqn: Eqn, dimension_numbers: Any) -> float:
    out, lhs = _compat.aval(eqn.outvars[0]), _compat.aval(eqn.invars[0])
    (contracted, _), _ = dimension_numbers
    return 2 * out.size * math.prod(lhs.shape[k] for k in contracted)


def _conv_general_dilated(eqn: Eqn) -> float:
    out, kernel = _compat.aval(eqn.outvars[0]), _compat.aval(eqn.invars[1])
    channels = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * out.size * math.prod(n for k, n in enumerate(kernel.shape) if k != channels)


_FORMULAS = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot_general,
    "conv_general_dilated": _conv_general_dilated,
}
