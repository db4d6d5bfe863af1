"""What an extension of jlora builds on. jlora's own methods and rules use the same interface.

A method declares the axes of its factors, how they start, and the products that it adds:

    @dataclasses.dataclass(frozen=True)
    class GatedLoRA(jlora.extend.Method):
        rank: int = jlora.extend.positive_integer(8)

        factors = {"a": "*stack *in rank", "gate": "*stack rank", "b": "*stack rank *out"}
        initializers = {"a": jlora.extend.kaiming, "gate": jax.nn.initializers.ones, "b": jax.nn.initializers.zeros}
        networks = ("a gate b",)

One that computes what it adds overrides `lower`, with `add_network`, `add_matrix`, `add_structure` and `scale_axes`.

A rule specifies what a JAX primitive does to an adapted weight:

    @jlora.extend.register_rule("my_primitive")
    def my_rule(ctx, eqn, f): ...

`treat_as(op, plain)` gives a custom kernel a plain equivalent, so that weights which go into it are adapted factored. A
quantised format is a subclass of `Quantized`.
"""

from jlora._interpreter.context import Context as Context
from jlora._interpreter.rules import register_rule as register_rule
from jlora._interpreter.site import Site as Site
from jlora._ir.algebra import map_index as map_index
from jlora._ir.algebra import merge_indices as merge_indices
from jlora._ir.algebra import relabel as relabel
from jlora._ir.lazy import bind as bind
from jlora._ir.lazy import consume as consume
from jlora._ir.structured import Structure as Structure
from jlora._ir.weight import AdaptedWeight as AdaptedWeight
from jlora._ir.weight import AxisMap as AxisMap
from jlora._ir.weight import Index as Index
from jlora._ir.weight import TensorNetwork as TensorNetwork
from jlora._ops.treat_as import treat_as as treat_as
from jlora._tree.leaves import Quantized as Quantized
from jlora.methods._base import Adapter as Adapter
from jlora.methods._base import Method as Method
from jlora.methods._base import Update as Update
from jlora.methods._common.factor_axes import WeightAxes as WeightAxes
from jlora.methods._common.hyperparameters import choice as choice
from jlora.methods._common.hyperparameters import fraction as fraction
from jlora.methods._common.hyperparameters import integer as integer
from jlora.methods._common.hyperparameters import nonzero as nonzero
from jlora.methods._common.hyperparameters import number as number
from jlora.methods._common.hyperparameters import optional as optional
from jlora.methods._common.hyperparameters import positive_integer as positive_integer
from jlora.methods._common.hyperparameters import switch as switch
from jlora.methods._common.initializers import Initializer as Initializer
from jlora.methods._common.initializers import kaiming as kaiming
from jlora.methods._common.matrices import as_matrix as as_matrix
from jlora.methods._common.matrices import dense_matrix as dense_matrix
from jlora.methods._common.networks import add_matrix as add_matrix
from jlora.methods._common.networks import add_network as add_network
from jlora.methods._common.networks import add_structure as add_structure
from jlora.methods._common.networks import group_labels as group_labels
from jlora.methods._common.networks import map_axes as map_axes
from jlora.methods._common.networks import scale_axes as scale_axes

__all__ = [
    "AdaptedWeight",
    "Adapter",
    "AxisMap",
    "Context",
    "Index",
    "Initializer",
    "Method",
    "Quantized",
    "Site",
    "Structure",
    "TensorNetwork",
    "Update",
    "WeightAxes",
    "add_matrix",
    "add_network",
    "add_structure",
    "as_matrix",
    "bind",
    "choice",
    "consume",
    "dense_matrix",
    "fraction",
    "group_labels",
    "integer",
    "kaiming",
    "map_axes",
    "map_index",
    "merge_indices",
    "nonzero",
    "number",
    "optional",
    "positive_integer",
    "register_rule",
    "relabel",
    "scale_axes",
    "switch",
    "treat_as",
]
__docformat__ = "google"
