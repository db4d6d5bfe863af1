"""The classes of methods by name, so that a checkpoint finds the class that it was saved with."""

import importlib
import sys
from collections.abc import Mapping
from types import FunctionType

_CLASSES: dict[str, type] = {}
_MODULES: dict[str, str] = {}  # of jlora's own methods, which are imported when their names are first looked up
_LIBRARY = __name__.rpartition(".")[0]


def qualified_name(method_class: type) -> str:
    """The name under which a class is saved: the class name for jlora's own methods, else module and class name."""
    if method_class.__module__.startswith(f"{_LIBRARY}."):
        return method_class.__name__
    return f"{method_class.__module__}.{method_class.__qualname__}"


def declare(modules: Mapping[str, str]) -> None:
    """States which module defines each of jlora's own methods. The module need not be imported yet."""
    _MODULES.update(modules)


def register(method_class: type) -> None:
    """Adds a class.

    Raises:
        TypeError: if another class has the same module and name: a checkpoint could not tell them apart.
    """
    name = qualified_name(method_class)
    other = _class_named(name)
    is_interactive = method_class.__module__ == "__main__" and hasattr(sys, "ps1")
    if other is not None and not is_interactive and not _is_same_definition(method_class, other):
        raise TypeError(f"There are two methods named {name}: rename one, so that saved adapters can be loaded.")
    _CLASSES[name] = method_class


def _is_same_definition(one: type, other: type) -> bool:
    """Whether two classes come from the same lines: a decorator copied the class, or its module was run again."""
    places = [
        {(f.__code__.co_filename, f.__code__.co_firstlineno) for f in vars(c).values() if isinstance(f, FunctionType)}
        for c in (one, other)
    ]
    return bool(places[0] & places[1])


def _class_named(name: str) -> type | None:
    """The class with a qualified name; one of jlora's own is imported. None if there is no such class."""
    if name in _MODULES:
        importlib.import_module(_MODULES[name])
    return _CLASSES.get(name)


def find(name: str) -> type | None:
    """The class that was saved under a name; None if there is not exactly one.

    Earlier releases saved the bare class name of every method. It is looked up among jlora's own methods first.
    """
    exact = _class_named(name)
    if exact is not None:
        return exact
    last = name.rpartition(".")[2]
    matches = [c for c in _CLASSES.values() if c.__name__ == last and qualified_name(c) != c.__name__]
    return matches[0] if len(matches) == 1 else None
