"""Second moments of the inputs of a weight."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jlora._tree.paths import closest_matches
from jlora.methods._base import Update


@functools.partial(jax.tree_util.register_dataclass, data_fields=["second", "total", "rows"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Sums over the inputs x of a weight, for each layer or expert of a stack. Those of several batches are added.

    Arguments:
        second: the sum of x x^T, `(*stack, in, in)`. None for an embedding, whose inputs are unit vectors: there it is
            the diagonal matrix of `total`.
        total: the sum of x, `(*stack, in)`; of an embedding, how often each row was looked up.
        rows: the number of inputs, `(*stack)`.
    """

    second: Any
    total: Any
    rows: Any


def layer(inputs: Inputs, index: tuple[int, ...], path: str) -> Inputs:
    """The statistics of one layer in float64, on the host.

    Arguments:
        inputs: the statistics.
        index: the position of the layer in the stack.
        path: of the weight, for the error.

    Raises:
        ValueError: if no input was recorded, or a number is not finite.
    """
    second, total, rows = (
        None if a is None else np.asarray(a, np.float64)[index] for a in (inputs.second, inputs.total, inputs.rows)
    )
    where = path + (f", at {index} of its stack" if index else "")
    if rows == 0:
        raise ValueError(
            f"{where}: no input was recorded. Either no row reaches the weight (an expert that is not chosen: record "
            "more data), or the outputs of the function do not depend on it through derivatives. Else leave it out."
        )
    if not all(a is None or np.isfinite(a).all() for a in (second, total)):
        raise ValueError(f"{where}: its inputs have entries that are infinite or not a number.")
    return Inputs(second, total, rows)


def layers_of(path: str, update: Update, inputs: Mapping[str, Inputs]) -> Inputs:
    """The statistics of a weight.

    Raises:
        ValueError: if no inputs were recorded for the weight, or their sizes are not those of the weight.
    """
    if path not in inputs:
        raise ValueError(
            f"{path}: its inputs were not recorded ({closest_matches(path, inputs)}). Pass what jlora.calibrate "
            "records for this adapter."
        )
    sums, axes = inputs[path], update.axes
    expected = (*axes.sizes("*stack"), axes.count("*in"))
    if np.shape(sums.total) != expected:
        raise ValueError(
            f"{path}: the recorded inputs have the shape {np.shape(sums.total)}, the weight has {expected}. Pass what "
            "jlora.calibrate records for this adapter."
        )
    return sums
