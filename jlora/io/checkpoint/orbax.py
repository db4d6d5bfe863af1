"""Saves and loads adapters, with the state of their training: arrays through Orbax, and JSON that describes them."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jlora import _compat
from jlora._adapter.sharding import shardings
from jlora._tree.paths import is_array, named_leaves, without_boxes
from jlora.io.checkpoint import checksums, fingerprint, metadata, reader, train_state
from jlora.io.checkpoint.errors import CheckpointError as CheckpointError
from jlora.io.checkpoint.placement import HOST, Placement, placement_of
from jlora.io.file_paths import absolute
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single, check_fits, with_static_scale

ARRAYS, METADATA = "arrays", "jlora"


def save(path: str | os.PathLike[str], adapter: Adapter, *, params: Any = None, hashes: bool = False) -> None:
    """Writes an adapter to a new folder, completely or not at all.

    The folder holds the arrays as Orbax writes them, and a JSON file: method, roles, shape and scale of every update,
    dtype, shape and checksums of every array, the versions of the libraries, and the description of the base. On a
    mesh every process writes its own shards. Dropout keys are not saved.

    Arguments:
        path: the folder, which must not exist.
        adapter: the adapter.
        params: the base parameters. Their paths, shapes and dtypes are recorded, so that `load` refuses another base.
        hashes: records a hash of every base parameter too, so that `load` refuses a base with other values.

    Raises:
        FileExistsError: if the path exists.
        ValueError: if the adapter is empty, does not fit `params`, or has a hyper-parameter that JSON cannot hold.
        CheckpointError: if the folder cannot be written; then it does not exist.
    """
    folder = absolute(path)
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Save to another path, or remove it first.")
    items = checkpoint_args(adapter, params=params, hashes=hashes)
    handlers = {ARRAYS: ocp.PyTreeCheckpointHandler(use_compression=False), METADATA: ocp.JsonCheckpointHandler()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax, TensorStore and the file system have no error class in common
        for incomplete in folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(incomplete, ignore_errors=True)
        raise CheckpointError(
            f"The adapter could not be written to {folder}, and nothing was left there: {error}. "
            "Check the free space and the permission to write, and save again."
        ) from error


def checkpoint_args(
    adapter: Adapter, state: Any = None, *, params: Any = None, hashes: bool = False
) -> dict[str, ocp.args.CheckpointArgs]:
    """Returns the arguments with which Orbax's `CheckpointManager` saves an adapter and the state of its training.

        manager.save(step, args=ocp.args.Composite(**jlora.checkpoint_args(adapter, state, params=params)))

    Orbax copies the values before `manager.save` returns, so a save in the background may overlap the next steps.
    You can add items of your own. `jlora.load` and `jlora.load_state` read the folder of a step,
    `manager.directory / str(step)`.

    Arguments:
        adapter: the adapter.
        state: any tree of arrays, PRNG keys, numbers, strings and booleans: for example the optimiser's state, the
            step, and the position in the data (a NumPy generator's `bit_generator.state`).
        params: as for `save`.
        hashes: as for `save`.

    Returns:
        the arguments by the name of their item.

    Raises:
        ValueError: as for `save`.
        TypeError: if a leaf of the state has another type, or an array has no value (under `jax.jit`).
    """
    adapter = {path: with_static_scale(path, update) for path, update in as_single(adapter).items()}
    arrays = metadata.arrays_of(adapter)
    if not arrays:
        raise ValueError("The adapter is empty: there is nothing to save.")
    for name, array in arrays.items():
        if isinstance(array, jax.ShapeDtypeStruct) or _compat.is_tracer(array):
            raise TypeError(
                f"{name} is of type {type(array).__name__}, which has no value: save outside of jax.jit, and not the "
                "result of jax.eval_shape."
            )
    base = _describe_base(adapter, params, hashes)
    state_arrays, leaves = train_state.split(state)
    arrays |= state_arrays
    rest = {
        "base": base,
        "state": None if state is None else leaves,
        "arrays": {name: checksums.record(array) for name, array in arrays.items()},
    }
    stored = {name: array for name, array in arrays.items() if array.size}  # zarr has no empty arrays
    chunks = {name: ocp.SaveArgs(chunk_byte_size=checksums.PIECE_BYTES) for name in stored}
    return {
        ARRAYS: ocp.args.PyTreeSave(stored, save_args=chunks),
        METADATA: ocp.args.JsonSave(metadata.describe(adapter, rest)),
    }


def load(path: str | os.PathLike[str], *, params: Any = None) -> Adapter:
    """Reads an adapter that `save` or a `CheckpointManager` wrote. It needs no template.

    Arguments:
        path: the folder.
        params: the base parameters of the adapter, arrays or `jax.ShapeDtypeStruct`. They are compared with the
            recorded base, and every factor is placed like its weight (`jlora.shardings`), on any number of devices;
            a process reads what its own devices need. Without `params` nothing is compared, and all arrays are
            placed on the default device.

    Returns:
        the adapter.

    Raises:
        FileNotFoundError: if the folder does not exist.
        NotADirectoryError: if the path is that of a file.
        CheckpointError: if the folder holds no adapter, was truncated or altered, has a format or a method that this
            release does not know, or was saved for another base; lists every difference.
    """
    folder, meta = _open(path)
    with _usable(folder):
        if params is not None:
            paths = dict(named_leaves(params)).keys()
            base = meta["base"] and without_boxes(meta["base"], paths)
            meta |= {"updates": without_boxes(meta["updates"], paths), "base": base}
            _check_base(folder, meta, params)
        placements = _placements(meta, params)
        return metadata.rebuild(meta, reader.read(folder / ARRAYS, meta["arrays"], placements))


def load_state(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads the state that was saved beside an adapter.

    Arguments:
        path: the folder.
        like: a tree with the structure, shapes and dtypes of the state, for example that of a new run,
            `{"optimiser": tx.init(adapter), "step": 0}`. Every array is placed like the one in this tree.

    Returns:
        the state.

    Raises:
        FileNotFoundError: if the folder does not exist.
        CheckpointError: if no state was saved, or it was altered, or it does not fit the tree; lists every difference.
    """
    folder, meta = _open(path)
    with _usable(folder):
        leaves = meta["state"]
        if leaves is None:
            raise CheckpointError(
                f"{folder} holds an adapter without a state. Save one with jlora.checkpoint_args(adapter, state)."
            )
        leaves = without_boxes(leaves, dict(named_leaves(like)).keys())
        placements = train_state.placements(leaves, like)
        return train_state.join(leaves, reader.read(folder / ARRAYS, meta["arrays"], placements), like)


@contextlib.contextmanager
def _usable(folder: Path) -> Iterator[None]:
    """Raises `CheckpointError` if metadata that are intact hold what jlora does not write."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / METADATA} cannot be used: {error!r}. Its contents are not what jlora writes; save again."
        ) from error


def _open(path: str | os.PathLike[str]) -> tuple[Path, metadata.Meta]:
    folder = absolute(path)
    if folder.is_file():
        raise NotADirectoryError(
            f"{folder} is a file, and a saved adapter is a folder. jlora.info(path) tells the format of a file, and so "
            "which call reads it."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no saved adapter at {folder}; jlora.save(path, adapter) writes one.")
    return folder, metadata.read(folder / METADATA)


def _describe_base(adapter: Adapter, params: Any, hashes: bool) -> dict[str, Any] | None:
    """Returns what is recorded of the base, which the adapter has to fit."""
    if params is None:
        if hashes:
            raise ValueError("hashes=True records hashes of the base parameters: pass params too.")
        return None
    check_fits([adapter], {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)})
    return fingerprint.fingerprint(params, hashes)


def _check_base(folder: Path, meta: metadata.Meta, params: Any) -> None:
    """Raises `CheckpointError` if the base is not the recorded one or, if none is, has other adapted weights."""
    adapted = {path: {"shape": update["shape"]} for path, update in meta["updates"].items()}
    complete = meta["base"] is not None
    lines = fingerprint.differences(meta["base"] if complete else adapted, params, complete=complete)
    if lines:
        raise CheckpointError(
            f"The adapter at {folder} was saved for another base. Pass the parameters that it was trained on; "
            "without params nothing is compared.\n  " + "\n  ".join(lines)
        )


def _placements(meta: metadata.Meta, params: Any) -> dict[str, Placement]:
    """Returns the placement of every array of an adapter: that of its weight, or the default device."""
    names = {
        name: name
        for update in meta["updates"].values()
        for group in metadata.GROUPS
        for name in update[group].values()
    }
    if params is None:
        return dict.fromkeys(names)
    records = {name: meta["arrays"][name] for name in names}
    structs = {
        name: jax.ShapeDtypeStruct(tuple(record["shape"]), jnp.dtype(record["dtype"]))
        for name, record in records.items()
    }
    targets = shardings(metadata.rebuild(meta, structs), params)
    leaves = dict(named_leaves(params))
    out: dict[str, Placement] = {}
    for path, update in metadata.rebuild(meta, names).items():
        uncommitted = placement_of(leaves[path]) in (None, HOST)
        for name, target in zip(jax.tree.leaves(update), jax.tree.leaves(targets[path]), strict=True):
            out[name] = None if uncommitted else target
    return out
