"""What a file has for the weight of one module."""

from typing import NamedTuple

import numpy as np

from jlora.io.peft.layouts import FactorInFile, Layout
from jlora.methods._base import Method


class ModuleContent(NamedTuple):
    """The factors of a module as a file has them.

    Arguments:
        method: the method.
        layout: of its tensors.
        arrays: by factor, as in the file.
        scale: what multiplies the update beside the method's own scale.
    """

    method: Method
    layout: Layout
    arrays: dict[str, np.ndarray]
    scale: float = 1.0


def layout(**factors: tuple[str, str]) -> Layout:
    """A layout from the name of each factor's tensor and its axes."""
    return {factor: FactorInFile(*row) for factor, row in factors.items()}
