"""What an extension of jlora builds on. jlora's own methods and rules use the same interface.

A rule specifies what a JAX primitive does to an adapted weight:

    @jlora.extend.register_rule("my_primitive")
    def my_rule(ctx, eqn, f): ...

`treat_as(op, plain)` gives a custom kernel a plain twin, so that weights which go into it are adapted factored.
"""

from jlora._interpreter.context import Context as Context
from jlora._interpreter.rules import register_rule as register_rule
from jlora._ir.algebra import map_index as map_index
from jlora._ir.algebra import merge_indices as merge_indices
from jlora._ir.algebra import relabel as relabel
from jlora._ir.lazy import bind as bind
from jlora._ir.lazy import consume as consume
from jlora._ir.weight import AdaptedWeight as AdaptedWeight
from jlora._ir.weight import AxisScale as AxisScale
from jlora._ir.weight import Index as Index
from jlora._ir.weight import TensorNetwork as TensorNetwork
from jlora._ops.treat_as import treat_as as treat_as

__all__ = [
    "AdaptedWeight",
    "AxisScale",
    "Context",
    "Index",
    "TensorNetwork",
    "bind",
    "consume",
    "map_index",
    "merge_indices",
    "register_rule",
    "relabel",
    "treat_as",
]
__docformat__ = "google"
