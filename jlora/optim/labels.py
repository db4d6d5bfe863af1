"""Labels and masks of trainable leaves, for optax."""

import dataclasses
import sys
from typing import Any

import jax

from jlora.methods._base import Update


def labels(tree: Any) -> Any:
    """Names the group of every leaf, for `optax.multi_transform` and `optax.partition`.

    Arguments:
        tree: an adapter, or any tree that holds adapters (and base parameters) anywhere.

    Returns:
        a tree of the same structure: for a trainable factor its name (`"a"`, `"b"`, ...), for other leaves `"frozen"`.

    Raises:
        ValueError: if the tree is a state of Flax NNX, which has arrays in the place of updates.

    Example:
        transforms = {"a": optax.adam(1e-4), "b": optax.adam(1e-3), "frozen": optax.set_to_zero()}
        tx = optax.multi_transform(transforms, jlora.labels)
    """
    check_holds_updates(tree)
    return jax.tree.map(_label, tree, is_leaf=lambda node: isinstance(node, Update))


def mask(tree: Any) -> Any:
    """Marks the leaves that train, for `optax.masked`.

    Arguments:
        tree: an adapter, or any tree that holds adapters (and base parameters) anywhere.

    Returns:
        a tree of the same structure: True for trainable factors, False for other leaves.

    Example:
        tx = optax.masked(optax.adamw(1e-4, weight_decay=0.01), jlora.mask)
    """
    return jax.tree.map(lambda label: label != "frozen", labels(tree))


def check_holds_updates(tree: Any) -> None:
    """Raises if a tree is the state of an NNX module: it has the factors of an adapter, and not what they are.

    Raises:
        ValueError: with what to write instead.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(tree, nnx.State):
        raise ValueError(
            "The tree is a state of Flax NNX, in which jlora cannot tell what the factors are. The last keys are their "
            "names, for optax.multi_transform({'a': ..., 'b': ...}, lambda state: jax.tree_util.tree_map_with_path("
            "lambda keys, _: [k.key for k in keys if hasattr(k, 'key')][-1], state)). Or train the adapter itself, "
            "jlora.nnx.adapter(model), by a loop of your own."
        )


def _label(node: Any) -> Any:
    if not isinstance(node, Update):
        return "frozen"
    return dataclasses.replace(
        node,
        factors={name: jax.tree.map(lambda _, name=name: name, factor) for name, factor in node.factors.items()},
        frozen=jax.tree.map(lambda _: "frozen", node.frozen),
        initial=jax.tree.map(lambda _: "frozen", node.initial),
        key=jax.tree.map(lambda _: "frozen", node.key),
        rank_mask=jax.tree.map(lambda _: "frozen", node.rank_mask),
        traced_scale=jax.tree.map(lambda _: "frozen", node.traced_scale),
    )
