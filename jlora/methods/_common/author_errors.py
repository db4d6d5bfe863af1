"""Checks of how a method is constructed, and of what its class declares."""

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any


class ConstructorSignature:
    """The signature of a class without that of `__new__`, for `help` and `inspect.signature`."""

    def __get__(self, instance: object, cls: type) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def check_arguments(cls: type, args: Sequence[Any], given: Collection[str]) -> None:
    """Checks the arguments of a constructor by their names.

    Arguments:
        cls: the class of the method.
        args: the positional arguments.
        given: the names of the keyword arguments.

    Raises:
        TypeError: if there is no argument of a name, or the class has fields and is not a dataclass.
    """
    if "__dataclass_fields__" in vars(cls) and all(name in vars(cls)["__dataclass_fields__"] for name in given):
        return  # too many positional arguments are an error of Python's
    parameters = ConstructorSignature().__get__(None, cls).parameters
    if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
        raise TypeError(f"{cls.__name__} declares fields: put @dataclasses.dataclass(frozen=True) above the class.")
    kinds = [parameter.kind for parameter in parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds or inspect.Parameter.VAR_POSITIONAL in kinds:
        return
    problem = ""
    if unknown := [name for name in given if name not in parameters]:
        problem = f"no argument {unknown[0]!r}"
    elif len(args) > kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD):
        problem = f"no {len(args)} positional arguments"
    if problem:
        hint = "" if "__init__" in vars(cls) else " Put @dataclasses.dataclass(frozen=True) above a class with fields."
        raise TypeError(f"{cls.__name__} has {problem}; its arguments are {', '.join(parameters) or 'none'}.{hint}")


def network_names(method: str, networks: tuple[str, ...], declared: Mapping[str, str]) -> list[list[str]]:
    """The names of the factors of every declared network.

    Arguments:
        method: the name of the class.
        networks: products of factors, `("a b",)`.
        declared: the axes of the arrays, by name.

    Raises:
        TypeError: if `networks` is one string, or a network names an array that is not declared.
    """
    if isinstance(networks, str):
        raise TypeError(f"{method}.networks is the string {networks!r}: write a tuple, ({networks!r},).")
    names = [network.split() for network in networks]
    for name in (name for network in names for name in network):
        if name not in declared:
            raise TypeError(
                f"{method}.networks names the array {name!r}, and `factors` declares {', '.join(declared)}."
            )
    return names


def check_frozen(method: str, frozen: tuple[str, ...], declared: Collection[str]) -> None:
    """Checks the names of the arrays that do not train.

    Arguments:
        method: the name of the class.
        frozen: the names.
        declared: the names of all arrays.

    Raises:
        TypeError: if `frozen` is one string, or a name is not declared, so that the array meant would train.
    """
    if isinstance(frozen, str):
        raise TypeError(f"{method}.frozen is the string {frozen!r}: return a tuple, ({frozen!r},).")
    for name in frozen:
        if name not in declared:
            raise TypeError(f"{method}.frozen names the array {name!r}, and `factors` declares {', '.join(declared)}.")
