"""FLOPs of a jaxpr's products, from shapes alone."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

from jlora import _compat


def flops(jaxpr: Any) -> float:
    """FLOPs of all products and convolutions, loops counted as often as they run where that is known.

    A `while` loop counts once, and a `cond` as its dearest branch.
    """
    return sum(_equation(eqn) for eqn in _compat.open_jaxpr(jaxpr)[0].eqns)


def _equation(eqn: Any) -> float:
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (inner, _), _ = p["dimension_numbers"]
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[k] for k in inner)
    if name == "ragged_dot_general":
        (inner, _), _ = p["ragged_dot_dimension_numbers"].dot_dimension_numbers
        return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[k] for k in inner)
    if name == "conv_general_dilated":
        out, kernel = eqn.outvars[0].aval, eqn.invars[1].aval
        channels = kernel.shape[p["dimension_numbers"].rhs_spec[0]]
        return 2 * out.size * kernel.size / max(channels, 1)
    if name == "cond":
        return max(flops(branch) for branch in p["branches"])
    inner = sum(flops(sub) for value in p.values() for sub in _jaxprs(value))
    return inner * (p["length"] if name == "scan" else 1)


def _jaxprs(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in values if isinstance(v, (Jaxpr, ClosedJaxpr))]
