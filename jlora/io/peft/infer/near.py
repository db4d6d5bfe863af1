"""What a parameter without a tensor is nearest to: for errors and reports."""

from collections.abc import Iterable, Mapping

import numpy as np

from jlora._tree.paths import closest_matches
from jlora.io.peft.infer.layout import plain_layouts, source_positions
from jlora.io.peft.infer.solution import Leaf
from jlora.io.peft.infer.table import TensorTable
from jlora.io.peft.infer.words import skeleton

_SAMPLES = 256
_MAX_TENSORS = 64  # that are compared with one parameter
_MAX_PATHS = 16


def near_misses(paths: Iterable[str], leaves: Mapping[str, Leaf], table: TensorTable) -> dict[str, str]:
    """For each path a phrase with the tensors that come nearest; values are compared for one path of each kind.

    Arguments:
        paths: of parameters without a tensor.
        leaves: all parameters.
        table: of the checkpoint.
    """
    phrases, compared = {}, set()
    for path in paths:
        size = leaves[path].array().size
        alike = [name for name in table.names if table.files.size(name) == size]
        phrase = ""
        if skeleton(path) not in compared and len(compared) < _MAX_PATHS:
            compared.add(skeleton(path))
            phrase = _nearest(leaves[path].array(), alike[:_MAX_TENSORS], table)
        if not phrase:
            kind = "of the same size" if alike else "of any size"
            phrase = f"{closest_matches(path, alike or table.names)} ({kind})"
        phrases[path] = phrase
    return phrases


def _nearest(array: np.ndarray, names: list[str], table: TensorTable) -> str:
    """The tensor that is nearly proportional to a parameter, and how far it is away; empty if there is none."""
    positions = np.random.default_rng(0).integers(0, array.size, min(_SAMPLES, 4 * array.size))
    values = array.reshape(-1)[positions].astype(np.float64)
    best, phrase = 0.9, ""
    for name in names:
        tensor = table.read(name).reshape(-1)
        for layout in plain_layouts(array.shape, table.shape(name)):
            other = tensor[source_positions(layout, positions)].astype(np.float64)
            norms = np.linalg.norm(values) * np.linalg.norm(other)
            cosine = float(values @ other / norms) if norms else 0.0
            if abs(cosine) > best:
                factor = float(values @ other / (other @ other))
                error = np.linalg.norm(values - factor * other) / np.linalg.norm(values)
                best, phrase = abs(cosine), _phrase(name, factor, float(error), values, other)
    return phrase


def _phrase(name: str, factor: float, error: float, values: np.ndarray, other: np.ndarray) -> str:
    if error < 1e-5 or (error < 5e-3 and abs(factor - 1) > 0.02):
        return f"it is {factor:.6g} times {name}: undo the scaling"
    distance = float(np.linalg.norm(values - other) / np.linalg.norm(values))
    return f"it differs from {name} by {distance:.1e} of its norm: was it trained, or cast in another way?"
