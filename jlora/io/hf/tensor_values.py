"""The tensors of a checkpoint with the values of merged parameters."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jlora._tree.leaves import explicit_axes, is_quantized
from jlora._tree.paths import Tree, is_array, named_leaves
from jlora.io.hf.names_by_hand import pieces_by_hand
from jlora.io.peft.infer.pieces import Block, Piece, to_source
from jlora.io.peft.infer.result import InferredNames
from jlora.io.torch.module_names import Names
from jlora.io.torch.tensor_files import TensorFiles


class TensorValues:
    """The new value of every tensor.

    Arguments:
        params: the merged parameters.
        names: an inferred map, or one by hand.
        files: the checkpoint.

    Attributes:
        unused: the floating-point tensors that no parameter holds.

    Raises:
        ValueError: if a parameter has no tensor, or another shape.
    """

    def __init__(self, params: Tree, names: Names, files: TensorFiles) -> None:
        self._files, self._params = files, _arrays(params)
        if isinstance(names, InferredNames):
            _check_inferred(names, self._params, files)
            pieces, self._copies = names.leaves, names.copies
        else:
            pieces, self._copies = pieces_by_hand(names, self._params, files)
        self._pieces: dict[str, list[tuple[str, Piece]]] = collections.defaultdict(list)
        for path, path_pieces in pieces.items():
            for piece in path_pieces:
                self._pieces[piece.tensor].append((path, piece))
        self.unused = tuple(name for name in files.floating() if not self._pieces_of(name))

    def tensor(self, name: str) -> np.ndarray | None:
        """The new value of a tensor; None if no parameter holds it.

        Raises:
            ValueError: if parameters that share the tensor differ, or its dtype cannot hold a number of theirs.
        """
        if not self._pieces_of(name):
            return None
        former = np.ascontiguousarray(self._files.read(name))
        tensor = former.copy()
        for path, block, piece in self._blocks(name):
            piece.source.of(tensor)[...] = _cast(block, piece.source.of(former), path, name)
        paths = [path for path, _ in self._pieces_of(name)]
        for path, block, piece in self._blocks(name) if len(paths) > 1 else ():
            expected = _cast(block, piece.source.of(former), path, name)
            if not np.array_equal(piece.source.of(tensor), expected, equal_nan=True):
                others = ", ".join(sorted({*paths} - {path})) or "other layers of its stack, or other parts of itself,"
                raise ValueError(
                    f"{path} shares the tensor {name} with {others} and has other values. They are one weight in the "
                    "checkpoint: adapt all of them alike, or none."
                )
        return tensor

    def _pieces_of(self, name: str) -> list[tuple[str, Piece]]:
        return self._pieces.get(self._copies.get(name, name), [])

    def _blocks(self, name: str) -> Iterator[tuple[str, np.ndarray, Piece]]:
        """For every parameter that holds a block of a tensor its path, and the block in the tensor's layout."""
        for path, piece in self._pieces_of(name):
            block = on_host(self._params[path], piece.leaf)
            yield path, to_source(block, piece.sizes, piece.order, piece.source.shape), piece


def on_host(array: jax.Array | np.ndarray, leaf: Block) -> np.ndarray:
    """A block of a parameter; of a stack only its layer leaves the device."""
    count = next((k for k, entry in enumerate(leaf.index) if isinstance(entry, range)), len(leaf.index))
    layer = array.reshape(leaf.view)[leaf.index[:count]] if count else array
    return Block(leaf.view[count:], leaf.index[count:]).of(np.asarray(layer))


def _cast(block: np.ndarray, former: np.ndarray, path: str, name: str) -> np.ndarray:
    """A block in the dtype of the tensor. A number that did not change keeps all its bits.

    Raises:
        ValueError: if a number becomes infinite.
    """
    with np.errstate(over="ignore"):
        cast = block.astype(former.dtype)
        if (np.isinf(cast) & np.isfinite(block)).any():
            raise ValueError(
                f"{path} has the number {np.abs(block.astype(np.float64)).max():g}, which {former.dtype}, the dtype of "
                f"{name} in the checkpoint, cannot hold."
            )
        return np.where(former.astype(block.dtype) == block, former, cast)


def _arrays(params: Tree) -> dict[str, jax.Array | np.ndarray]:
    """The floating-point parameters by path.

    Raises:
        ValueError: if one is quantised, abstract, or not whole in this process.
    """
    arrays = {}
    for path, leaf in named_leaves(params):
        if is_quantized(leaf):
            raise ValueError(f"{path} is quantised. Merge into the float parameters, or call jlora.dequantize first.")
        if not is_array(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            continue
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{path} has no values: pass arrays.")
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            raise ValueError(
                f"{path} is divided among processes. Gather it first: "
                "jax.experimental.multihost_utils.process_allgather(params, tiled=True)."
            )
        arrays[path] = _sliceable(leaf) if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return arrays


def _sliceable(array: jax.Array) -> jax.Array:
    """The same array without a copy, on a mesh without Explicit axes: along these JAX may refuse to slice."""
    placement: Any = array.sharding
    if not explicit_axes(placement) or not array.is_fully_addressable:
        return array
    mesh = Mesh(placement.mesh.devices, placement.mesh.axis_names)
    return jax.device_put(array, NamedSharding(mesh, placement.spec, memory_kind=placement.memory_kind))


def _check_inferred(names: InferredNames, params: Mapping[str, Any], files: TensorFiles) -> None:
    names.check()
    missing = [path for path in names.leaves if path not in params]
    if missing:
        raise ValueError(f"The params lack {', '.join(missing[:5])}: pass all that the names were found for.")
    for path, value in params.items():
        if path not in names.shapes:
            raise ValueError(
                f"{path} has no tensor in the checkpoint: it was not among the params that infer_names got. Leave it "
                "out, params without it, and save it beside the model."
            )
        if tuple(value.shape) != names.shapes[path]:
            raise ValueError(
                f"{path} has shape {tuple(value.shape)}, and the names were found for {names.shapes[path]}."
            )
        if path in names.constant and not bool((value == names.constant[path]).all()):
            raise ValueError(
                f"{path} has no tensor in the checkpoint; it was {names.constant[path]:g} everywhere and is not any "
                "more. A model in the checkpoint's files cannot hold it: do not train it."
            )
    absent = [piece.tensor for pieces in names.leaves.values() for piece in pieces if piece.tensor not in files.entries]
    if absent:
        raise ValueError(f"like has no tensor {absent[0]}: pass the checkpoint that the names were found in.")
    for name, shape in names.checkpoint.shapes.items():
        if name in files.entries and files.shape(name) != tuple(shape):
            raise ValueError(
                f"{name} has shape {files.shape(name)} in like, and {tuple(shape)} where the names were found."
            )
