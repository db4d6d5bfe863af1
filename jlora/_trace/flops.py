"""FLOPs of a jaxpr's products, from shapes alone."""

import math
from typing import Any

from jlora import _compat
from jlora._compat import Eqn


def flops(jaxpr: Any) -> float:
    """FLOPs of all products and convolutions of an open or closed jaxpr.

    The body of a `scan` counts once for each step, that of a `while` loop once, and a `cond` as its largest branch.
    """
    return sum(map(_equation, _compat.open_jaxpr(jaxpr)[0].eqns))


def _equation(eqn: Eqn) -> float:
    name, p = eqn.primitive.name, eqn.params
    if name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
        out, (left, right) = _compat.aval(eqn.outvars[0]), map(_compat.aval, eqn.invars[:2])
        if name == "conv_general_dilated":
            channels = right.shape[p["dimension_numbers"].rhs_spec[0]]
            return 2 * out.size * right.size / max(channels, 1)
        ragged = name == "ragged_dot_general"
        dims = p["ragged_dot_dimension_numbers"].dot_dimension_numbers if ragged else p["dimension_numbers"]
        (contracted, _), _ = dims
        return 2 * out.size * math.prod(left.shape[k] for k in contracted)
    if name == "cond":
        return max(flops(branch) for branch, _ in _compat.cond_params(eqn).branches)
    inner = sum(flops(body) for body, _ in _compat.bodies(eqn))
    return inner * (_compat.scan_params(eqn).length if name == "scan" else 1)
