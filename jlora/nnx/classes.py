"""The classes of adapted modules: subclasses whose methods apply the factors."""

import functools
import inspect
import types
from typing import Any

from flax import nnx

from jlora.nnx.call import call
from jlora.nnx.factors import Factors
from jlora.nnx.graph import attribute_of, nodes_of, variables_of

_OF_EVERY_MODULE = (frozenset(dir(nnx.Module)) - {"__call__"}) | {"set_view"}
_OPERATORS = ("call", "getitem", "matmul", "rmatmul", "mul", "rmul", "add", "radd", "sub", "rsub", "truediv", "neg")
_SPECIAL_METHODS = frozenset(f"__{name}__" for name in _OPERATORS)


def attach(module: Any, factors: dict[int, Factors]) -> None:
    """Makes a module adapted, in place: puts factors beside their weights, in every module that has the weight.

    Arguments:
        module: the module.
        factors: by the `id` of the Variable of the weight.

    Raises:
        ValueError: if an attribute has the name that the factors need; if no module holds a weight.
    """
    unplaced = set(factors)
    for node in nodes_of(module):
        for name, variable in variables_of(node).items():
            if id(variable) in factors:
                attribute = attribute_of(name)
                if attribute in vars(node) or hasattr(type(node), attribute):
                    raise ValueError(f"{type(node).__name__} has an attribute {attribute!r} already: rename it.")
                setattr(node, attribute, factors[id(variable)])
                unplaced.discard(id(variable))
    if unplaced:
        paths = ["/".join(map(str, path)) for path, node in nnx.iter_graph(module, graph=True) if id(node) in unplaced]
        raise ValueError(
            f"{', '.join(paths)}: held by no module that could apply the update, but by a list or dict alone or by "
            "a subclass of nnx.List or nnx.Dict. Make it an nnx.List or nnx.Dict that is an attribute of a module, or "
            "exclude the path."
        )
    for node in list(nodes_of(module)):
        if any(isinstance(inner, Factors) for _, inner in nnx.iter_graph(node, graph=True)):
            object.__setattr__(node, "__class__", adapted_class(type(node)))


@functools.cache
def adapted_class(cls: type) -> type:
    """The subclass of a module's class whose methods apply the factors that the module holds.

    Operators such as `module[i]` and `module @ x` are methods too. The methods of `nnx.Module` itself (`train`, `sow`,
    ...) stay as they are, and so do properties.
    """

    def body(namespace: dict[str, Any]) -> None:
        namespace |= {name: _adapted_method(cls, name) for name in dir(cls) if _is_method(cls, name)}
        namespace["__module__"], namespace["__doc__"] = cls.__module__, cls.__doc__
        namespace["__reduce__"] = lambda self: (_empty, (cls,), self.__getstate__())
        namespace["is_adapted_by_jlora"] = True

    is_tree = cls._pytree__is_pytree or issubclass(cls, nnx.Object)  # pyright: ignore[reportAttributeAccessIssue]
    return types.new_class(f"Adapted{cls.__name__}", (cls,), {} if is_tree else {"pytree": False}, body)


def _empty(cls: type) -> Any:
    """An adapted module without attributes, for pickle."""
    return object.__new__(adapted_class(cls))


def _is_method(cls: type, name: str) -> bool:
    if name in _OF_EVERY_MODULE or (name.startswith("__") and name not in _SPECIAL_METHODS):
        return False
    value = inspect.getattr_static(cls, name)
    if isinstance(value, (type, staticmethod, classmethod)):
        return False
    return isinstance(value, functools.partialmethod | functools.singledispatchmethod) or (
        callable(value) and hasattr(value, "__get__")
    )


def _adapted_method(cls: type, name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, lambda module, /, *args, **kwargs: getattr(module, name)(*args, **kwargs), args, kwargs)

    return functools.wraps(getattr(cls, name))(method)
