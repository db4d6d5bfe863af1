"""Which leaves train: labels and masks for optax."""

import dataclasses
from typing import Any

import jax

from jlora.methods._base import Update


def labels(tree: Any) -> Any:
    """Names the group of every leaf, for `optax.multi_transform` and `optax.partition`.

    Arguments:
        tree: an adapter, or any tree that holds adapters (and base parameters) anywhere.

    Returns:
        a tree of the same structure: the factor's name (`"a"`, `"b"`, ...) where it trains, `"frozen"` elsewhere.
    """
    return jax.tree.map(_label, tree, is_leaf=lambda node: isinstance(node, Update))


def mask(tree: Any) -> Any:
    """Marks the leaves that train, for `optax.masked`.

    Arguments:
        tree: an adapter, or any tree that holds adapters (and base parameters) anywhere.

    Returns:
        a tree of the same structure: True on trainable factors, False elsewhere.
    """
    return jax.tree.map(lambda label: label != "frozen", labels(tree))


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
    )
