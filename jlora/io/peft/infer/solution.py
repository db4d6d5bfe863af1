"""The parameters that are looked at, and what has been found of them."""

import dataclasses

import numpy as np

from jlora._tree.leaves import is_quantized
from jlora._tree.paths import Tree, named_leaves
from jlora.io.peft.infer.pieces import Piece


@dataclasses.dataclass
class Solution:
    """What is known of every parameter.

    Arguments:
        pieces: by path, for parameters of which every block has its tensor.
        shapes: of all parameters.
        without_source: constant parameters, or blocks of them, for which the checkpoint has no tensor.
        ambiguous: by path the tensors that remain possible.
        unmatched: by path why no tensor was found.
        constant_paths: the parameters whose elements are all equal.
        copies: tensors with the values of another one that a parameter is made of, with the name of that.
    """

    pieces: dict[str, tuple[Piece, ...]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    without_source: dict[str, float] = dataclasses.field(default_factory=dict)
    ambiguous: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unmatched: dict[str, str] = dataclasses.field(default_factory=dict)
    constant_paths: set[str] = dataclasses.field(default_factory=set)
    copies: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def open_paths(self) -> set[str]:
        """The parameters that have no pieces."""
        return {*self.ambiguous, *self.unmatched, *self.without_source}


class Leaf:
    """A parameter in host memory while it is looked at.

    Arguments:
        value: the parameter.
    """

    def __init__(self, value: object) -> None:
        self._value = value

    def array(self) -> np.ndarray:
        """Its numbers."""
        return np.asarray(self._value)


def floating_leaves(params: Tree) -> dict[str, Leaf]:
    """The parameters that may come from a checkpoint, by path.

    Raises:
        ValueError: if a parameter has no values, or is quantised.
    """
    leaves = {}
    for path, leaf in named_leaves(params):
        if is_quantized(leaf):
            raise ValueError(f"{path} is quantised, so it equals no tensor: infer the names before jlora.quantize.")
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not leaf.size or str(dtype) not in ("float64", "float32", "float16", "bfloat16"):
            continue
        if not hasattr(leaf, "__array__"):
            raise ValueError(f"{path} is abstract: infer_names compares values. Pass the params as they were loaded.")
        leaves[path] = Leaf(leaf)
    return leaves
