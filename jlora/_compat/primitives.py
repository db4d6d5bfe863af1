"""What jlora's own primitives are defined with."""

from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir

__all__ = ["Primitive", "ad", "batching", "mlir"]
