"""Adapters and what trains them on disk: arrays through Orbax, and beside them JSON that says what they are."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora._adapter.sharding import shardings
from jlora._tree.paths import is_array, named_leaves
from jlora.io.checkpoint import fingerprint as _base
from jlora.io.checkpoint import metadata as _describe
from jlora.io.checkpoint import reader as _arrays
from jlora.io.checkpoint import train_state as _state
from jlora.io.checkpoint.checksums import sums
from jlora.io.checkpoint.errors import CheckpointError as CheckpointError
from jlora.methods._base import Adapter
from jlora.methods._lowering import as_single, check_fits

ARRAYS, META = "arrays", "jlora"


def save(path: str | os.PathLike[str], adapter: Adapter, *, params: Any = None, hashes: bool = False) -> None:
    """Writes an adapter to a new folder, whole or not at all.

    The folder holds the arrays as Orbax writes them and a JSON file with every update's method, roles, shape and
    scale, the dtype, shape and sums of every array, the versions that wrote it, and what is known of the base. On a
    mesh every process writes its own shards. Dropout keys are not kept.

    Arguments:
        path: the folder, which must not exist.
        adapter: the adapter.
        params: the base parameters, whose paths, shapes and dtypes are kept so that `load` can refuse another base.
        hashes: keeps a sum of every base parameter's bytes too, so that `load` refuses a base of other values.

    Raises:
        FileExistsError: where the path exists.
        ValueError: where the adapter is empty, does not fit `params`, or has what JSON cannot hold.
        CheckpointError: where the folder cannot be written; it does not exist then.
    """
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if folder.exists():
        raise FileExistsError(f"{folder} exists. Save to another path, or remove it first.")
    items = checkpoint_args(adapter, params=params, hashes=hashes)
    handlers = {ARRAYS: ocp.PyTreeCheckpointHandler(use_compression=False), META: ocp.JsonCheckpointHandler()}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as checkpointer:
            checkpointer.save(folder, args=ocp.args.Composite(**items))
    except Exception as error:  # whatever Orbax, TensorStore and the file system raise
        for left in folder.parent.glob(f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        raise CheckpointError(
            f"The adapter could not be written to {folder}, and nothing is there: {error}. "
            "Look for space and for the right to write, and save again."
        ) from error


def checkpoint_args(
    adapter: Adapter, state: Any = None, *, params: Any = None, hashes: bool = False
) -> dict[str, ocp.args.CheckpointArgs]:
    """Makes what Orbax's own `CheckpointManager` needs to keep an adapter and all that trains it.

        manager.save(step, args=ocp.args.Composite(**jlora.checkpoint_args(adapter, state, params=params)))

    Orbax takes the values before `manager.save` returns, so a save in the background may overlap the next steps.
    Items of your own go beside these. `jlora.load` and `jlora.load_state` read a step's folder,
    `manager.directory / str(step)`.

    Arguments:
        adapter: the adapter.
        state: any tree of arrays, PRNG keys, numbers, strings and booleans: the optimiser's state, the step, the
            position in the data (a NumPy generator's `bit_generator.state`, for one).
        params, hashes: as for `save`.

    Raises:
        ValueError: as for `save`.
        TypeError: where the state has a leaf of another kind.
    """
    arrays = _describe.arrays_of(as_single(adapter))
    if not arrays:
        raise ValueError("The adapter is empty: there is nothing to save.")
    if hashes and params is None:
        raise ValueError("hashes are of the base parameters: pass params too.")
    if params is not None:
        check_fits([adapter], {path: leaf for path, leaf in named_leaves(params) if is_array(leaf)})
    more, leaves = _state.split(state)
    arrays |= more
    rest = {
        "base": None if params is None else _base.fingerprint(params, hashes),
        "state": None if state is None else leaves,
        "arrays": {name: sums(array) for name, array in arrays.items()},
    }
    stored = {name: array for name, array in arrays.items() if array.size}
    return {ARRAYS: ocp.args.PyTreeSave(stored), META: ocp.args.JsonSave(_describe.describe(adapter, rest))}


def load(path: str | os.PathLike[str], *, params: Any = None) -> Adapter:
    """Reads an adapter that `save` or a `CheckpointManager` wrote. No template is needed.

    Arguments:
        path: the folder.
        params: the base parameters that it is for, arrays or `jax.ShapeDtypeStruct`. They are compared with what the
            checkpoint says of its base, and each factor goes to where its weight lies (`jlora.shardings`), on any
            number of devices; a process reads what its own devices need. Without them nothing is compared, and all
            goes to the default device.

    Returns:
        the adapter.

    Raises:
        FileNotFoundError: where there is no such folder.
        CheckpointError: where it is no adapter, or was truncated or altered, or has a format or method that this
            release does not know, or was made for another base; with every misfit.
    """
    folder, meta = _open(path)
    with _understood(folder):
        expected = {path: {"shape": said["shape"]} for path, said in meta["updates"].items()}
        base = meta["base"] if meta["base"] is not None else expected
        wrong = [] if params is None else _base.misfits(base, params, whole=meta["base"] is not None)
        if wrong:
            raise CheckpointError(
                f"The adapter at {folder} was made for another base. Pass the parameters that it was made for; "
                "without params nothing is compared.\n  " + "\n  ".join(wrong)
            )
        names = {name: name for said in meta["updates"].values() for g in _describe.GROUPS for name in said[g].values()}
        places = dict.fromkeys(names) if params is None else _places(_describe.rebuild(meta, names), params)
        return _describe.rebuild(meta, _arrays.read(folder / ARRAYS, meta["arrays"], places))


def load_state(path: str | os.PathLike[str], like: Any) -> Any:
    """Reads the state that was saved beside an adapter.

    Arguments:
        path: the folder.
        like: a tree of the same structure, shapes and dtypes; its arrays say where each goes. The state of a new
            run, `{"optimiser": tx.init(adapter), "step": 0}`, is one.

    Raises:
        FileNotFoundError: where there is no such folder.
        CheckpointError: where there is no state, or it was altered, or does not fit the tree; with every misfit.
    """
    folder, meta = _open(path)
    with _understood(folder):
        leaves = meta["state"]
        if leaves is None:
            raise CheckpointError(
                f"{folder} holds an adapter alone: jlora.checkpoint_args(adapter, state) keeps a state."
            )
        places = _state.places(leaves, like)
        return _state.join(leaves, _arrays.read(folder / ARRAYS, meta["arrays"], places), like)


@contextlib.contextmanager
def _understood(folder: Path) -> Iterator[None]:
    """A description that is intact and yet not what jlora writes is told as such."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(f"What {folder / META} says cannot be used: {error!r}") from error


def _open(path: str | os.PathLike[str]) -> tuple[Path, _describe.Meta]:
    folder = Path(os.path.abspath(os.path.expanduser(path)))
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no saved adapter at {folder}; jlora.save(path, adapter) writes one.")
    return folder, _describe.read(folder / META)


def _places(names: Adapter, params: Any) -> dict[str, _arrays.Place]:
    """The place of every array of an adapter, whose leaves are their names."""
    targets = shardings(names, params)
    leaves = dict(named_leaves(params))
    out: dict[str, _arrays.Place] = {}
    for path, update in names.items():
        free = _state.place(leaves[path]) in (None, _arrays.HOST)
        for name, target in zip(jax.tree.leaves(update), jax.tree.leaves(targets[path]), strict=True):
            out[name] = None if free else target
    return out
