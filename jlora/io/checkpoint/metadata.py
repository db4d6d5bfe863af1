"""The JSON description beside the arrays: methods, roles, shapes, versions, the base. Older formats are converted."""

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jlora.io.checkpoint import bank_index
from jlora.io.checkpoint.errors import CheckpointError
from jlora.methods._base import Adapter, Method, Update
from jlora.methods._description import as_number, describe_method, rebuild_method

FORMAT = 3
GROUPS = ("factors", "frozen", "initial", "rank_mask")
FILE = "metadata"  # as Orbax names what it writes of JSON

Meta = dict[str, Any]


def arrays_of(adapter: Adapter) -> dict[str, Any]:
    """Every array of an adapter by its name in the checkpoint."""
    return {
        _name(path, group, name): array
        for path, update in adapter.items()
        for group, arrays in _grouped(update).items()
        for name, array in arrays.items()
    }


def _grouped(update: Update) -> dict[str, dict[str, Any]]:
    """The arrays of an update by group; dropout keys are not saved."""
    mask = {} if update.rank_mask is None else {"rank": update.rank_mask}
    return {"factors": update.factors, "frozen": update.frozen, "initial": update.initial, "rank_mask": mask}


def describe(adapter: Adapter, rest: Mapping[str, Any]) -> Meta:
    """The description of an adapter, with the entries of `rest` and a SHA-256 checksum.

    Raises:
        ValueError: if a value cannot be stored as JSON.
    """
    methods: list[dict[str, Any]] = []
    updates = {}
    for path, update in adapter.items():
        method = describe_method(update.method)
        if method not in methods:
            methods.append(method)
        updates[path] = {
            "method": methods.index(method),
            "roles": update.roles,
            "shape": update.shape,
            "scale": update.scale,
        } | {group: {name: _name(path, group, name) for name in arrays} for group, arrays in _grouped(update).items()}
    meta: Meta = {
        "format": FORMAT,
        "versions": _versions(),
        "methods": methods,
        "updates": updates,
        **rest,
    }
    try:
        meta = json.loads(json.dumps(meta, default=as_number))
    except TypeError as error:
        raise ValueError(
            f"Only numbers, strings, booleans, None and tuples of them can be saved beside arrays, but {error}."
        ) from error
    return meta | {"sha256": _digest(meta)}


def _other_format(folder: Path) -> str:
    """What to call for a folder without a description, by what is in it."""
    for name, call in (("adapter_config.json", "jlora.peft.load"), (bank_index.FILE, "jlora.bank.load")):
        if (folder / name).exists():
            return f" It has a file {name}: {call} reads it."
    steps = sorted((path for path in folder.iterdir() if (path / "jlora").exists()), key=lambda path: path.name)
    return f" It holds checkpoints: pass the folder of one, such as {steps[-1]}." if steps else ""


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jlora", "jax", "orbax-checkpoint")}


def read(folder: Path) -> Meta:
    """The description in a folder, converted to the newest format.

    Raises:
        CheckpointError: if it is missing, cannot be read, was altered, or has a later format.
    """
    file = folder / FILE
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        version = meta["format"]
        intact = isinstance(version, int) and meta.pop("sha256") == _digest(meta)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder.parent} is not a saved adapter, or an incomplete one: {folder.name}/{FILE} is missing."
            + _other_format(folder.parent)
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
        CheckpointError: if a method is not registered, or does not accept the saved hyper-parameters.
    """
    methods = [_method(entry) for entry in meta["methods"]]
    return {
        path: Update(
            factors={name: arrays[key] for name, key in entry["factors"].items()},
            frozen={name: arrays[key] for name, key in entry["frozen"].items()},
            initial={name: arrays[key] for name, key in entry["initial"].items()},
            rank_mask=next((arrays[key] for key in entry["rank_mask"].values()), None),
            method=methods[entry["method"]],
            roles=tuple(entry["roles"]),
            shape=tuple(entry["shape"]),
            scale=entry["scale"],
        )
        for path, entry in meta["updates"].items()
    }


def _method(entry: Mapping[str, Any]) -> Method:
    try:
        return rebuild_method(entry)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _from_1(meta: Meta) -> Meta:
    """Format 1 repeated the method with every update, and had one SHA-256 sum for every array."""
    methods, updates = [], {}
    for path, entry in meta["updates"].items():
        method = {"name": entry.pop("method"), "hyperparameters": entry.pop("hyperparameters")}
        if method not in methods:
            methods.append(method)
        keys = [key.rsplit(":", 2) for key in meta["arrays"]]
        groups = {
            g: {n: f"{p}:{g}:{n}" for p, group, n in keys if (p, group) == (path, g)} for g in ("factors", "frozen")
        }
        updates[path] = entry | {"method": methods.index(method)} | groups
    arrays = {
        key: entry | {"shard": entry["shape"], "piece": entry["shape"], "sums": [entry["sha256"]]}
        for key, entry in meta["arrays"].items()
    }
    return meta | {"format": 2, "methods": methods, "updates": updates, "arrays": arrays, "base": None, "state": None}


def _from_2(meta: Meta) -> Meta:
    """Format 2 had the initial factors and rank masks among the frozen arrays, and groups as a part of LoRA."""
    for entry in meta["updates"].values():
        frozen = entry["frozen"]
        suffix = "_at_start"
        initial = {name: key for name, key in frozen.items() if name.endswith(suffix)}
        entry["initial"] = {name.removesuffix(suffix): key for name, key in initial.items()}
        entry["rank_mask"] = {"rank": frozen["kept"]} if "kept" in frozen else {}
        entry["frozen"] = {name: key for name, key in frozen.items() if name not in {*initial, "kept"}}
    return meta | {"format": 3, "methods": [_without_groups(entry) for entry in meta["methods"]]}


def _without_groups(entry: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(entry["hyperparameters"])
    if entry["name"] != "LoRA" or "groups" not in values:
        return dict(entry)
    if values["groups"] > 1:
        values.pop("start", None)
        return {"name": "GroupedLoRA", "hyperparameters": values}
    values = {name: value for name, value in values.items() if name not in ("groups", "enable", "group_axis")}
    return {"name": "LoRA", "hyperparameters": values}


_MIGRATIONS: dict[int, Callable[[Meta], Meta]] = {1: _from_1, 2: _from_2}


def _name(path: str, group: str, name: str) -> str:
    """The name of an array. It is quoted, so that a store does not take a "/" in it for a folder."""
    return f"{quote(path, safe='')}:{group}:{quote(name, safe='')}"


def _digest(meta: Meta) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
