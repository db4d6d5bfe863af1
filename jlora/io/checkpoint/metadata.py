"""What the JSON beside the arrays says: methods, roles, shapes, versions, the base; and older formats made new."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jlora.io.checkpoint.errors import CheckpointError
from jlora.methods._base import Adapter, Method, Update

FORMAT = 2
GROUPS = ("factors", "frozen")
FILE = "metadata"  # as Orbax names what it writes of JSON

Meta = dict[str, Any]


def arrays_of(adapter: Adapter) -> dict[str, Any]:
    """Every array of an adapter by its name in the checkpoint."""
    return {
        _name(path, group, name): array
        for path, update in adapter.items()
        for group in GROUPS
        for name, array in getattr(update, group).items()
    }


def describe(adapter: Adapter, rest: Mapping[str, Any]) -> Meta:
    """The description of an adapter, with all that `rest` adds and the sum over it."""
    methods: list[dict[str, Any]] = []
    updates = {}
    for path, update in adapter.items():
        method = {"name": type(update.method).__name__, "hyperparameters": dataclasses.asdict(update.method)}  # pyright: ignore[reportArgumentType]
        if method not in methods:
            methods.append(method)
        updates[path] = {
            "method": methods.index(method),
            "roles": update.roles,
            "shape": update.shape,
            "scale": update.scale,
        } | {group: {name: _name(path, group, name) for name in getattr(update, group)} for group in GROUPS}
    meta: Meta = {
        "format": FORMAT,
        "versions": _versions(),
        "methods": methods,
        "updates": updates,
        **rest,
    }
    try:
        meta = json.loads(json.dumps(meta, default=_number))
    except TypeError as error:
        raise ValueError(
            f"Only numbers, strings, booleans, None and tuples of them can be saved beside arrays: {error}."
        ) from error
    return meta | {"sha256": _digest(meta)}


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jlora", "jax", "orbax-checkpoint")}


def read(folder: Path) -> Meta:
    """The description in a folder, in the newest format.

    Raises:
        CheckpointError: where there is none, or it was altered, or has a later format.
    """
    file = folder / FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        version = meta["format"]
        intact = isinstance(version, int) and meta.pop("sha256") == _digest(meta)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder.parent} is no saved adapter, or an incomplete one: {folder.name}/{FILE} is missing."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged and cannot be read: {error!r}") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{folder.parent} has format {version}, and this release of jlora reads up to {FORMAT}; upgrade."
        )
    if not intact or version not in (*_MIGRATIONS, FORMAT):
        raise CheckpointError(f"{file} was altered after it was written.")
    for older in range(version, FORMAT):
        meta = _MIGRATIONS[older](meta)
    return meta


def rebuild(meta: Meta, arrays: Mapping[str, Any]) -> Adapter:
    """The adapter of a description, with `arrays` by name.

    Raises:
        CheckpointError: where this release lacks a method or one of its hyper-parameters.
    """
    methods = [_method(said) for said in meta["methods"]]
    return {
        path: Update(
            factors={name: arrays[key] for name, key in said["factors"].items()},
            frozen={name: arrays[key] for name, key in said["frozen"].items()},
            method=methods[said["method"]],
            roles=tuple(said["roles"]),
            shape=tuple(said["shape"]),
            scale=said["scale"],
        )
        for path, said in meta["updates"].items()
    }


def _method(said: Mapping[str, Any]) -> Method:
    name = said["name"]
    methods = {method.__name__: method for method in Method.__subclasses__()}
    if name not in methods:
        raise CheckpointError(
            f"The method {name!r} is not in this release of jlora: upgrade, or import it first if it is your own."
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said["hyperparameters"].items()}
    try:
        return methods[name](**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} in this release does not take what was saved: {error}") from error


def _from_1(meta: Meta) -> Meta:
    """Format 1 repeated the method with every update, and had one SHA-256 sum for every array."""
    methods, updates = [], {}
    for path, said in meta["updates"].items():
        method = {"name": said.pop("method"), "hyperparameters": said.pop("hyperparameters")}
        if method not in methods:
            methods.append(method)
        owned = [key.rsplit(":", 2) for key in meta["arrays"]]
        groups = {g: {n: f"{p}:{g}:{n}" for p, group, n in owned if (p, group) == (path, g)} for g in GROUPS}
        updates[path] = said | {"method": methods.index(method)} | groups
    arrays = {
        key: said | {"shard": said["shape"], "piece": said["shape"], "sums": [said["sha256"]]}
        for key, said in meta["arrays"].items()
    }
    return meta | {"format": 2, "methods": methods, "updates": updates, "arrays": arrays, "base": None, "state": None}


_MIGRATIONS: dict[int, Callable[[Meta], Meta]] = {1: _from_1}


def _name(path: str, group: str, name: str) -> str:
    """A name that no store takes for a folder, whatever the path has in it."""
    return f"{quote(path, safe='')}:{group}:{quote(name, safe='')}"


def _number(value: Any) -> Any:
    """A number of NumPy or JAX as a Python number."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} is none of these")


def _digest(meta: Meta) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
