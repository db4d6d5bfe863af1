"""Walks through adapted modules: which Variables have factors, and the plain module inside."""

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import jax
from flax import nnx

from jlora.nnx.factors import Factors, is_variable

_CONTAINERS = (nnx.List, nnx.Dict)
_SUFFIX = "_lora"

Removed = list[tuple[nnx.Pytree, type, dict[str, Factors]]]


def nodes_of(module: Any) -> Iterator[nnx.Pytree]:
    """The module and all in it that may hold weights of its own, each once; lists and dicts are part of their owner."""
    for _, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, nnx.Pytree) and not isinstance(node, (*_CONTAINERS, Factors)):
            yield node


def variables_of(node: nnx.Pytree) -> dict[str, nnx.Variable[Any]]:
    """The Variables that a node holds itself, by the names of their attributes; `weights/0` if they are in a list."""

    def is_leaf(value: Any) -> bool:
        return is_variable(value) or (isinstance(value, nnx.Pytree) and type(value) not in _CONTAINERS)

    attributes = {name: value for name, value in vars(node).items() if not name.startswith("_pytree__")}
    leaves = jax.tree_util.tree_leaves_with_path(attributes, is_leaf=is_leaf)
    names = [(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf) for keys, leaf in leaves]
    return {name: leaf for name, leaf in names if is_variable(leaf)}


def bound_attributes(module: Any, weights: Collection[int]) -> list[str]:
    """The attributes that hold a method bound to a module with one of these weights; a copy would call the original.

    Arguments:
        module: the module.
        weights: the `id` of each Variable.
    """
    names = []
    for node in nodes_of(module):
        for name, value in vars(node).items():
            if callable(value) and not isinstance(value, type | nnx.Pytree | nnx.Variable | jax.Array):
                owner = getattr(inspect.unwrap(value), "__self__", None)
                is_module = isinstance(owner, nnx.Pytree)
                if is_module and any(id(inner) in weights for _, inner in nnx.iter_graph(owner, graph=True)):
                    names.append(f"{type(node).__name__}.{name}")
    return names


def factors_of(node: nnx.Pytree) -> dict[str, Factors]:
    """The factors that a node holds, by attribute."""
    return {name: value for name, value in vars(node).items() if isinstance(value, Factors)}


def adapted_variables(module: Any) -> Iterator[tuple[nnx.Variable[Any], Factors]]:
    """Every adapted weight with its factors, each once.

    Raises:
        ValueError: if the weight of factors is gone.
    """
    visited = set[int]()
    for node in nodes_of(module):
        weights = {attribute_of(name): variable for name, variable in variables_of(node).items()}
        for name, factors in factors_of(node).items():
            if name not in weights:
                raise ValueError(f"{type(node).__name__}.{name.removesuffix(_SUFFIX)} has factors and is no Variable.")
            if id(weights[name]) not in visited:
                visited.add(id(weights[name]))
                yield weights[name], factors


def attribute_of(name: str) -> str:
    return name.replace("/", "_") + _SUFFIX


def detach(module: Any) -> Removed:
    """Makes an adapted module plain, in place: its modules get their classes back, and lose their factors.

    Returns:
        for each changed node its adapted class and its factors, as `restore` takes them.
    """
    removed = []
    for node in list(nodes_of(module)):
        if is_adapted(node):
            removed.append((node, type(node), factors_of(node)))
            object.__setattr__(node, "__class__", type(node).__base__)
            for name in removed[-1][2]:
                delattr(node, name)
    return removed


def restore(removed: Removed) -> None:
    """Undoes `detach`."""
    for node, cls, factors in removed:
        for name, value in factors.items():
            setattr(node, name, value)
        object.__setattr__(node, "__class__", cls)


def is_adapted(node: Any) -> bool:
    """Whether a module is one that `jlora.nnx.adapt` returned, or a part of it that holds factors."""
    return "is_adapted_by_jlora" in vars(type(node))
