"""A term of a sum, kept apart from what computes it.

If the last term of a sum is reshaped or broadcast, XLA's CPU backend fuses the sum into each of its consumers, and so
keeps all terms in memory until the last of them, in the backward pass. With a barrier around that term it keeps the
sum. So in programs for the CPU this is a primitive that is lowered to a barrier, and so is the term's cotangent. In all
other programs no primitive is bound; one that was traced on a CPU host has no barrier on another platform either.
"""

from typing import Any

import jax
from jax import lax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir


def apart(x: jax.Array) -> jax.Array:
    """The array itself, behind a barrier in compiled programs for the CPU."""
    return apart_p.bind(x) if _compat.is_tracer(x) and _compat.is_for_cpu(x) else x


def _same(x: Any) -> Any:
    return x


apart_p = Primitive("jlora_apart")
apart_p.def_impl(_same)
apart_p.def_abstract_eval(_same)
ad.deflinear2(apart_p, lambda cotangent, _: [apart(cotangent)])
batching.defvectorized(apart_p)
mlir.register_lowering(apart_p, mlir.lower_fun(_same, multiple_results=False))
mlir.register_lowering(apart_p, mlir.lower_fun(lax.optimization_barrier, multiple_results=False), platform="cpu")
