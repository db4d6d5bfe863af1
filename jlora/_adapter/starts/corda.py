"""CorDA: factors from the singular vectors of a weight times the covariance of its inputs."""

from typing import Any, Literal

import numpy as np

from jlora._adapter.starts.inputs import Inputs, layer, layers_of
from jlora._adapter.starts.pairs import check, with_pair
from jlora._interpreter.context import matrix_side
from jlora._tree.leaves import layer_of
from jlora._tree.paths import named_leaves
from jlora.methods._base import Adapter, Update
from jlora.methods._lowering import as_single, check_fits

_CUTS = {"instruction": lambda rank: slice(0, rank), "knowledge": lambda rank: slice(-rank, None)}


def corda(
    adapter: Adapter,
    inputs: dict[str, Inputs],
    params: Any,
    *,
    mode: Literal["instruction", "knowledge"],
    damping: float = 0.01,
) -> Adapter:
    """Initialises LoRA with the part of each weight that its inputs use most, or least.

        C W = U S V^T,    A = C^-1 U_r S_r^(1/2) / sqrt(s),    B = S_r^(1/2) V_r^T / sqrt(s)

    C is the mean of x x^T, scaled to a mean diagonal of 1, plus `damping` times the identity; s is the scale of the
    update. The initial product is subtracted, and the base is not changed: at the start the program equals the base.

    Arguments:
        adapter: from `jlora.init`, of LoRA; its factors are replaced.
        inputs: from `jlora.calibrate`, at least for the paths of the adapter.
        params: the base parameters, quantised or not.
        mode: "instruction": the largest singular values, with inputs of the task to learn (the paper's
            instruction-previewed adaptation). "knowledge": the smallest ones, with inputs whose knowledge is to be
            preserved.
        damping: the share of the mean diagonal that is added to the diagonal of C, positive.

    Returns:
        the adapter. The decompositions are computed in float64 on the host, one layer at a time.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if `mode` or `damping` is not valid, a method is not LoRA, the adapter does not fit the parameters,
            the inputs of a weight are missing or not finite, or the singular values of the factors are zero.

    Example:
        inputs = jax.jit(jlora.calibrate(model.apply, adapter))(params, batch)
        adapter = jlora.corda(adapter, inputs, params, mode="instruction")

    Yang et al. 2024, CorDA: Context-Oriented Decomposition Adaptation of Large Language Models, arXiv:2406.05223.
    """
    if mode not in _CUTS:
        raise ValueError(f"CorDA's mode is 'instruction' or 'knowledge', not {mode!r}.")
    if not damping > 0:
        raise ValueError(f"CorDA's damping is a positive number, not {damping}.")
    updates, leaves = as_single(adapter), dict(named_leaves(params))
    check_fits([updates], leaves)
    return {path: _start(path, u, inputs, leaves[path], mode, damping) for path, u in updates.items()}


def _start(path: str, update: Update, inputs: dict[str, Inputs], leaf: Any, mode: str, damping: float) -> Update:
    method = check(path, update, "CorDA", is_zero=False)
    sums, stack = layers_of(path, update, inputs), update.axes.sizes("*stack")
    pairs = []
    for index in np.ndindex(*stack):
        weight = _matrix(update, leaf, index)
        pairs.append(_decompose(layer(sums, index, path), weight, _CUTS[mode](method.rank), damping, path))
    a, b = (np.stack([pair[k] for pair in pairs]).reshape(*stack, *pairs[0][k].shape) for k in (0, 1))
    root = np.sqrt(abs(method.scale))
    return with_pair(update, a / root, b / np.copysign(root, method.scale), is_zero=False)


def _decompose(x: Inputs, weight: np.ndarray, cut: slice, damping: float, path: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B of one layer, for scale 1."""
    diagonal = x.total if x.second is None else np.diag(x.second)
    if not diagonal.any():
        raise ValueError(f"{path}: all its inputs are zero, so no direction is more used than another. Leave it out.")
    scaled = (x.total if x.second is None else x.second) / diagonal.mean()
    c = scaled + damping if x.second is None else scaled + damping * np.eye(len(scaled))
    u, s, vt = np.linalg.svd(c[:, None] * weight if c.ndim == 1 else c @ weight, full_matrices=False)
    u, root, vt = u[:, cut], np.sqrt(s[cut]), vt[cut]
    if root.min() <= 1e-6 * np.sqrt(s[0]):
        raise ValueError(
            f"{path}: a singular value that CorDA selects is zero, so its column of A and its row of B would be zero "
            "and get no gradient. Lower the rank, or leave the weight out."
        )
    return (u / c[:, None] if c.ndim == 1 else np.linalg.solve(c, u)) * root, root[:, None] * vt


def _matrix(update: Update, leaf: Any, index: tuple[int, ...]) -> np.ndarray:
    """The weight of one layer in float64, `(in, out)`."""
    stack = [axis for axis, role in enumerate(update.roles) if role == "stack"]
    if update.layers is not None:
        index = (update.layers[index[0]], *index[1:])
    value = layer_of(leaf, dict(zip(stack, index, strict=True))).astype(np.float64)
    sides = [matrix_side(role) for role in update.roles if role != "stack"]
    order = sorted(range(len(sides)), key=lambda axis: sides[axis] == "out")
    return value.transpose(order).reshape(update.axes.count("*in"), -1)
