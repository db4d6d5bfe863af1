"""Methods and updates as text: what is stored beside the arrays in checkpoints and by other libraries."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jlora.methods._base import Method, Update
from jlora.methods._registry import find, qualified_name


def describe_method(method: Method) -> dict[str, Any]:
    """The name of a method's class and its hyper-parameters."""
    values = dataclasses.asdict(method)  # pyright: ignore[reportArgumentType]
    if values["layers"] is None:  # earlier releases do not have it
        del values["layers"]
    return {"name": qualified_name(type(method)), "hyperparameters": values}


def rebuild_method(description: Mapping[str, Any]) -> Method:
    """The method of a description.

    Raises:
        ValueError: if its class is not registered, or does not accept the hyper-parameters.
    """
    name = description["name"]
    method_class = find(name)
    if method_class is None:
        raise ValueError(
            f"The method {name!r} is not known: upgrade jlora, or import the module that defines it before loading."
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["hyperparameters"].items()}
    values = {**method_class.earlier_values, **values}
    try:
        return method_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} of this release does not accept the saved hyper-parameters: {error}") from error


def describe_update(update: Update) -> str:
    """All of an update but its arrays, as JSON."""
    method = describe_method(update.method)
    fields = {"method": method, "roles": update.roles, "shape": update.shape, "scale": update.scale}
    return json.dumps(fields, default=as_number, sort_keys=True)


def as_number(value: Any) -> Any:
    """A number of NumPy or JAX as a Python number: the `default` of `json.dumps`.

    Raises:
        TypeError: if the value is something else.
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is not one of these")
