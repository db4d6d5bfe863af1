"""How parameters are made of tensors, exactly: blocks of one that are blocks of the other, in another layout."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Index = tuple[int | range, ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of an array: `array.reshape(view)[index]`.

    Arguments:
        view: the shape of the array, with axes split if the block takes every so many rows of one.
        index: an integer or a range of consecutive positions for each axis of the view.
    """

    view: tuple[int, ...]
    index: Index

    def of(self, array: np.ndarray) -> np.ndarray:
        """The block; of an array that `reshape` need not copy it is a view, which may be written to."""
        index = tuple(entry if isinstance(entry, int) else slice(entry.start, entry.stop) for entry in self.index)
        return array.reshape(self.view)[(*index, ...)]  # the dots keep a view of a single number

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block."""
        return tuple(len(entry) for entry in self.index if isinstance(entry, range))

    @property
    def is_all(self) -> bool:
        """Whether it is the whole array."""
        return all(entry == range(size) for size, entry in zip(self.view, self.index, strict=True))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A block of a parameter that equals a block of a tensor, up to its layout and a cast.

        leaf.of(parameter)  ==  source.of(tensor).reshape(sizes).transpose(order).reshape(shape of the leaf's block)

    Arguments:
        tensor: the name of the tensor.
        leaf: the block of the parameter.
        source: the block of the tensor.
        sizes: a shape of the tensor's block whose axes are permuted.
        order: the permutation.
    """

    tensor: str
    leaf: Block
    source: Block
    sizes: tuple[int, ...]
    order: tuple[int, ...]

    def to_parameter(self, tensor: np.ndarray, parameter: np.ndarray) -> None:
        """Writes the tensor's block into a parameter, which is contiguous."""
        target = self.leaf.of(parameter)
        target[...] = to_leaf(self.source.of(tensor), self.sizes, self.order, target.shape).astype(target.dtype)

    def to_tensor(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Writes the parameter's block into a tensor, which is contiguous: the inverse of `to_parameter`."""
        target = self.source.of(tensor)
        target[...] = to_source(self.leaf.of(parameter), self.sizes, self.order, target.shape).astype(target.dtype)


def everything(shape: tuple[int, ...]) -> Block:
    """The whole of an array."""
    return Block(shape, tuple(range(size) for size in shape))


def to_leaf(block: np.ndarray, sizes: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor's block in the layout of the parameter."""
    return block.reshape(sizes).transpose(order).reshape(shape)


def to_source(block: np.ndarray, sizes: tuple[int, ...], order: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A parameter's block in the layout of the tensor."""
    return block.reshape([sizes[axis] for axis in order]).transpose(np.argsort(order)).reshape(shape)


Leaves = Mapping[str, tuple[Piece, ...]]


def assemble_parameter(
    pieces: Iterable[Piece], shape: tuple[int, ...], dtype: Any, read: Callable[[str], np.ndarray]
) -> np.ndarray:
    """A parameter from the tensors of a checkpoint; zeros in what no tensor holds (padding).

    Arguments:
        pieces: of the parameter.
        shape: of the parameter.
        dtype: of the parameter.
        read: gives a tensor by name.
    """
    parameter = np.zeros(shape, dtype)
    for piece in pieces:
        piece.to_parameter(read(piece.tensor), parameter)
    return parameter


def assemble_tensor(name: str, leaves: Leaves, tensor: np.ndarray, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """A tensor of the checkpoint with the values of the parameters, and its former values in what none holds.

    Arguments:
        name: of the tensor.
        leaves: the pieces of every parameter.
        tensor: as the checkpoint has it.
        read: gives a parameter by path; called for those that hold a piece of the tensor.
    """
    tensor = np.array(tensor, order="C")
    for path, pieces in leaves.items():
        used = [piece for piece in pieces if piece.tensor == name]
        parameter = np.ascontiguousarray(read(path)) if used else None
        for piece in used:
            piece.to_tensor(parameter, tensor)  # pyright: ignore[reportArgumentType]
    return tensor
