"""Adapters on disk: arrays through Orbax, and beside them JSON that says what they are."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jlora._method import Adapter, Update
from jlora.methods import METHODS

FORMAT = 1
_ARRAYS, _META = "arrays", "jlora"


class CheckpointError(ValueError):
    """A saved adapter that cannot be trusted or understood: truncated, altered, or of another format."""


def save(path: str | os.PathLike[str], adapter: Adapter) -> None:
    """Writes an adapter to a new folder, whole or not at all.

    The folder holds the arrays as Orbax writes them and a JSON file with every update's method, roles, shape and
    scale, the dtype, shape and SHA-256 sum of every array, and the versions that wrote it. Dropout keys are not kept.

    Arguments:
        path: the folder, which must not exist.
        adapter: the adapter.

    Raises:
        FileExistsError: where the path exists.
    """
    folder = Path(os.path.abspath(path))
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Save to another path, or remove it first.")
    arrays = _arrays(adapter)
    if not arrays:
        raise ValueError("The adapter is empty: there is nothing to save.")
    meta = {
        "format": FORMAT,
        "versions": {name: importlib.metadata.version(name) for name in ("jlora", "jax", "orbax-checkpoint")},
        "updates": {path: _describe(update) for path, update in adapter.items()},
        "arrays": {name: _summary(array) for name, array in arrays.items()},
    }
    meta["sha256"] = _digest(meta)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(_ARRAYS, _META)) as checkpointer:
        items = {_ARRAYS: ocp.args.PyTreeSave(arrays), _META: ocp.args.JsonSave(meta)}
        checkpointer.save(folder, args=ocp.args.Composite(**items))


def load(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter that `save` wrote. No template is needed.

    Arguments:
        path: the folder.

    Returns:
        the adapter, its arrays on the default device.

    Raises:
        FileNotFoundError: where there is no such folder.
        CheckpointError: where it is no adapter, or was truncated or altered, or has a format or method that this
            release does not know; with every misfit.
    """
    folder = Path(os.path.abspath(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no saved adapter at {folder}; jlora.save(path, adapter) writes one.")
    meta = _read_meta(folder)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(_ARRAYS, _META)) as checkpointer:
            as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in meta["arrays"]}
            template = dict.fromkeys(meta["arrays"], 0)
            restore = ocp.args.PyTreeRestore(item=template, restore_args=as_numpy)
            arrays = checkpointer.restore(folder, args=ocp.args.Composite(**{_ARRAYS: restore}))[_ARRAYS]
    except Exception as error:  # whatever Orbax and TensorStore raise for damaged files
        raise CheckpointError(f"The arrays of the adapter at {folder} cannot be read: {error}") from error
    misfits = [
        f"{name}: recorded {meta['arrays'][name]}, found {_summary(array)}"
        for name, array in arrays.items()
        if _summary(array) != meta["arrays"][name]
    ]
    if misfits:
        raise CheckpointError(f"The arrays of the adapter at {folder} were altered:\n  " + "\n  ".join(misfits))
    return {path: _rebuild(path, said, arrays) for path, said in meta["updates"].items()}


def _read_meta(folder: Path) -> dict[str, Any]:
    file = folder / _META / "metadata"
    try:
        meta = json.loads(file.read_text())
        version = meta["format"]
        intact = isinstance(version, int) and meta.pop("sha256") == _digest(meta)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no saved adapter, or an incomplete one: {file.name} is missing.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged and cannot be read: {error!r}") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, and this release of jlora reads up to {FORMAT}; upgrade."
        )
    if not intact:
        raise CheckpointError(f"{file} was altered after it was written.")
    return meta


def _arrays(adapter: Adapter) -> dict[str, Any]:
    """Every array under a flat name, `<path>:<group>:<name>`."""
    return {
        f"{path}:{group}:{name}": array
        for path, update in adapter.items()
        for group in ("factors", "frozen")
        for name, array in getattr(update, group).items()
    }


def _describe(update: Update) -> dict[str, Any]:
    return {
        "method": type(update.method).__name__,
        "hyperparameters": dataclasses.asdict(update.method),  # pyright: ignore[reportArgumentType]
        "roles": list(update.roles),
        "shape": list(update.shape),
        "scale": update.scale,
    }


def _rebuild(path: str, said: dict[str, Any], arrays: dict[str, Any]) -> Update:
    if said["method"] not in METHODS:
        raise CheckpointError(f"{path} has the method {said['method']!r}, and this release of jlora has none such.")
    try:
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in said["hyperparameters"].items()
        }
        method = METHODS[said["method"]](**values)
    except TypeError as error:
        raise CheckpointError(f"{path}: {said['method']} in this release does not take {error}.") from error
    groups: dict[str, dict[str, jax.Array]] = {"factors": {}, "frozen": {}}
    for full, array in arrays.items():
        owner, group, name = full.rsplit(":", 2)
        if owner == path:
            groups[group][name] = jnp.asarray(array)
    return Update(
        factors=groups["factors"],
        frozen=groups["frozen"],
        method=method,
        roles=tuple(said["roles"]),
        shape=tuple(said["shape"]),
        scale=said["scale"],
    )


def _summary(array: Any) -> dict[str, Any]:
    value = np.asarray(array)
    return {
        "shape": list(value.shape),
        "dtype": value.dtype.name,
        "sha256": hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest(),
    }


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
