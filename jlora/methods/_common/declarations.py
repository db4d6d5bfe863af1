"""Checks of what the class of a method declares."""

import dataclasses
from collections.abc import Collection, Mapping


def check_dataclass(cls: type) -> None:
    """Checks that a class that declares fields is a dataclass itself; else the fields are no arguments.

    Raises:
        TypeError: if it is not.
    """
    if any(isinstance(value, dataclasses.Field) for value in vars(cls).values()):
        raise TypeError(f"{cls.__name__} declares fields: put @dataclasses.dataclass(frozen=True) above the class.")


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
        TypeError: if `frozen` is one string, or a name is not declared, so that the intended array would train.
    """
    if isinstance(frozen, str):
        raise TypeError(f"{method}.frozen is the string {frozen!r}: return a tuple, ({frozen!r},).")
    for name in frozen:
        if name not in declared:
            raise TypeError(f"{method}.frozen names the array {name!r}, and `factors` declares {', '.join(declared)}.")
