"""Updates as pieces, one for each module of torch: factors with joint axes, cut and joined along the out axis."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jlora.io.torch.module_names import Index, Place
from jlora.methods._base import Method, Update
from jlora.methods.dora import DoRA
from jlora.methods.full import Full
from jlora.methods.ia3 import IA3
from jlora.methods.lora import LoRA

# For every factor its axes after the stack: i and o are the joint in and out axes, c the in axes without a window, x a
# part of the channels with the window, all others the method's own.
TERMS: dict[str, dict[str, str]] = {
    "LoRA": {"a": "ir", "b": "ro"},
    "DoRA": {"a": "ir", "b": "ro", "m": "o"},
    "LoHa": {"a0": "ir", "b0": "ro", "a1": "ir", "b1": "ro"},
    "LoKr": {"c": "wy", "ca": "wr", "cb": "ry", "d": "xz", "a": "xs", "b": "sz"},
    "VeRA": {"d": "r", "b": "o"},
    "IA3": {"l": "o"},
    "IA3 in": {"l": "c"},
    "Full": {"d": "io"},
    "Full vector": {"d": "o"},
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one module of torch holds of an update.

    Arguments:
        method: the method.
        scale: a multiplier of the whole.
        flat: the factors, their axes as in `TERMS`, with the experts of the module in front.
    """

    method: Method
    scale: float
    flat: dict[str, np.ndarray]

    @property
    def terms(self) -> dict[str, str]:
        wide = {name: array.ndim for name, array in self.flat.items()}
        own = TERMS[kind(self.method, wide.get("d", 0) > 1)]
        return {name: "e" * (n - len(own[name])) + own[name] for name, n in wide.items()}


def kind(method: Method, matrix: bool = True) -> str:
    """A method's row in `TERMS`."""
    if isinstance(method, IA3) and method.axis == "in":
        return "IA3 in"
    return "Full vector" if isinstance(method, Full) and not matrix else type(method).__name__


def divide(update: Update, place: Place) -> dict[Index, tuple[Piece | None, ...]]:
    """The pieces of an update by the index of its stack, side by side where several modules make up the weight.

    Raises:
        ValueError: where the modules' borders are not those of the update's groups, or no factor can be cut there.
    """
    arrays = {name: np.asarray(array) for name, array in update.factors.items()}
    arrays |= {name: np.asarray(array) for name, array in update.frozen.items() if name in TERMS["LoRA"]}
    if "kept" in update.frozen:
        kept = np.asarray(update.frozen["kept"]).astype(arrays["b"].dtype)
        arrays["b"] = arrays["b"] * kept.reshape(-1, *[1] * len(place.axes("out")))
    method = update.method
    if isinstance(method, LoRA) and method.groups > 1:
        return _ungrouped(method, update.scale, arrays, place)
    table = TERMS[kind(method, place.is_matrix)]
    joint = {name: _joined(_in_order(a, method, place), table[name], place) for name, a in arrays.items()}
    out = {}
    for index in place.modules:
        piece = Piece(method, update.scale, {name: array[index] for name, array in joint.items()})
        sizes = [place.count("out") // place.pieces] * place.pieces
        out[index] = tuple(cut(piece, sizes, place.path)) if place.pieces > 1 else (piece,)
    return out


def _in_order(array: np.ndarray, method: Method, place: Place) -> np.ndarray:
    """A weight's own axes in the order stack, in, out; factors have it."""
    if not isinstance(method, Full):
        return array
    return array.transpose([k for role in ("stack", "in", "out") for k in place.axes(role)])


def _joined(array: np.ndarray, term: str, place: Place) -> np.ndarray:
    """A factor with the in axes as one, channels first, and the out axes as one."""
    shape, at = list(array.shape[: len(place.sizes("stack"))]), len(place.sizes("stack"))
    inner = len(place.sizes("in"))
    widths = {"i": inner, "c": len(place.channels), "o": len(place.sizes("out"))}
    widths["x"] = inner if place.module.kind == "conv" else 1
    for letter in term:
        width = widths.get(letter, 1)
        if letter in "ix" and place.module.kind == "conv":
            array = np.moveaxis(array, at + (place.channel if letter == "i" else width - 1), at)
        shape.append(math.prod(array.shape[at : at + width]))
        at += width
    return array.reshape(shape)


def _split(array: np.ndarray, term: str, place: Place) -> np.ndarray:
    """The inverse of `_joined`."""
    stack = len(place.sizes("stack"))
    shape, moves = list(array.shape[:stack]), []
    known = {"i": place.sizes("in"), "c": place.channels, "o": place.sizes("out")}
    window = place.kernel[1:]
    for size, letter in zip(array.shape[stack:], term, strict=True):
        sizes = list(known.get(letter, (size,)))
        if letter == "i" and place.module.kind == "conv":
            moves = [(len(shape), len(shape) + place.channel)]
            sizes = [*place.kernel]
        elif letter == "x" and window:
            moves = [(len(shape), len(shape) + len(window))]
            sizes = [size // math.prod(window), *window]
        shape += sizes
    array = array.reshape(shape)
    for source, target in moves:
        array = np.moveaxis(array, source, target)
    return array


def _ungrouped(
    method: LoRA, scale: float, arrays: Mapping[str, np.ndarray], place: Place
) -> dict[Index, tuple[Piece | None, ...]]:
    """Every group as a LoRA of its own, or all as one in a module that holds the whole weight."""
    first = place.axes("out")[0]
    axis = first if method.group_axis is None else method.group_axis % len(place.weight.shape)
    if axis != first or place.pieces not in (1, method.groups):
        raise ValueError(
            f"{place.path} has {method.groups} groups on axis {axis}, and names give {place.pieces} modules along the "
            "first out axis: name one for each group."
        )
    enabled = [k for k in range(method.groups) if method.enable is None or method.enable[k]]
    plain = dataclasses.replace(method, groups=1, enable=None, group_axis=None)
    stack = place.sizes("stack")
    a = arrays["a"].reshape(*stack, -1, len(enabled), method.rank)
    b = arrays["b"].reshape(*stack, len(enabled), method.rank, -1)
    out = {}
    for index in place.modules:
        row: list[Piece | None] = [None] * method.groups
        for j, k in enumerate(enabled):
            row[k] = Piece(plain, scale, {"a": a[index][:, j], "b": b[index][j]})
        width = b.shape[-1]
        out[index] = tuple(row) if place.pieces > 1 else (join(row, [width] * method.groups, place.path),)
    return out


def cut(piece: Piece, sizes: Sequence[int], where: str) -> list[Piece]:
    """A piece in parts along its out axis; factors without that axis belong to every part.

    Raises:
        ValueError: where the sizes are not those of the axis, and where no factor has it.
    """
    terms = piece.terms
    total = next((piece.flat[n].shape[t.index("o")] for n, t in terms.items() if "o" in t), None)
    if isinstance(piece.method, IA3) and piece.method.axis == "in":
        return [piece] * len(sizes)
    if total != sum(sizes) or type(piece.method).__name__ in ("LoKr", "VeRA"):
        raise ValueError(
            f"{type(piece.method).__name__} of {where} cannot be cut into out sizes {list(sizes)} of {total}."
        )
    borders = list(itertools.accumulate(sizes))[:-1]
    parts: list[dict[str, np.ndarray]] = [{} for _ in sizes]
    for name, array in piece.flat.items():
        has = "o" in terms[name]
        many = np.split(array, borders, axis=terms[name].index("o")) if has else [array] * len(sizes)
        for part, one in zip(parts, many, strict=True):
            part[name] = one
    return [dataclasses.replace(piece, flat=part) for part in parts]


def join(parts: Sequence[Piece | None], sizes: Sequence[int], where: str) -> Piece:
    """Parts side by side along the out axis as one piece.

    Factors without that axis have to be equal; else several LoRAs become one, whose B is block-diagonal, and a part
    that is missing has zeros there.

    Raises:
        ValueError: where the parts have no common form.
    """
    there = [p for p in parts if p is not None]
    first = there[0]
    alike = all(p is not None and (p.method, p.scale) == (first.method, first.scale) for p in parts)
    terms = first.terms
    if alike and all(
        "o" in terms[name] or all(np.array_equal(p.flat[name], array) for p in there)
        for name, array in first.flat.items()
    ):
        flat = {
            name: np.concatenate([p.flat[name] for p in there], terms[name].index("o")) if "o" in terms[name] else array
            for name, array in first.flat.items()
        }
        return dataclasses.replace(first, flat=flat)
    kinds = {type(p.method) for p in there}
    if kinds not in ({LoRA}, {DoRA}) or "e" in terms["a"] or (kinds == {DoRA} and len(there) < len(parts)):
        raise ValueError(
            f"The weights that {where} joins have {', '.join(sorted(k.__name__ for k in kinds))} with factors of "
            "their own, and those cannot be put into one: adapt them all, by LoRA."
        )
    rank = sum(p.flat["a"].shape[1] for p in there)
    dtype = first.flat["b"].dtype
    b, row, column = np.zeros((rank, sum(sizes)), dtype), 0, 0
    unit = _scale(first)
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            high = part.flat["b"].shape[0]
            ratio = _scale(part) / unit
            b[row : row + high, column : column + size] = part.flat["b"] * dtype.type(ratio)
            row += high
        column += size
    flat = {"a": np.concatenate([p.flat["a"] for p in there], 1), "b": b}
    if kinds == {DoRA}:
        flat["m"] = np.concatenate([p.flat["m"] for p in there])
    dropout = max(p.method.dropout for p in there)
    make = DoRA if kinds == {DoRA} else LoRA
    return Piece(make(rank, unit * rank, dropout=dropout), 1.0, flat)


def _scale(piece: Piece) -> float:
    method = piece.method.direction if isinstance(piece.method, DoRA) else piece.method
    assert isinstance(method, LoRA)
    return method.scale * piece.scale


def side_by_side(parts: Sequence[Piece | None], place: Place) -> Piece:
    """The modules of one weight as one piece: with common factors, as groups, or with a block-diagonal B."""
    there = [p for p in parts if p is not None]
    if len(parts) == 1:
        return there[0]
    width = place.count("out") // place.pieces
    sizes = [
        width if p is None else next(p.flat[n].shape[t.index("o")] for n, t in p.terms.items() if "o" in t)
        for p in parts
    ]
    first = there[0]
    axis = place.axes("out")[0]
    alike = all((p.method, p.scale) == (first.method, first.scale) for p in there) and len(set(sizes)) == 1
    if type(first.method) is LoRA and alike and place.weight.shape[axis] % len(parts) == 0:
        if len(there) == len(parts) and all(np.array_equal(p.flat["a"], first.flat["a"]) for p in there):
            return join(parts, sizes, place.path)
        enable = None if len(there) == len(parts) else tuple(p is not None for p in parts)
        method = dataclasses.replace(first.method, groups=len(parts), enable=enable, group_axis=axis)
        flat = {"a": np.stack([p.flat["a"] for p in there], 1), "b": np.stack([p.flat["b"] for p in there])}
        return Piece(method, first.scale, flat)
    return join(parts, sizes, place.path)


def assemble(pieces: Mapping[Index, Piece], place: Place) -> Update:
    """The update of a weight from one piece for every index of its stack.

    LoRAs of several ranks and scales become one of the largest rank, with zeros in A and in B for what a module lacks:
    no gradient reaches those, so they stay zero.

    Raises:
        ValueError: where a module is missing, or they differ otherwise in method or scale.
    """
    missing = [place.modules[index][0] for index in place.modules if index not in pieces]
    if missing:
        raise ValueError(f"{place.path} is one weight for all of its stack, and {', '.join(missing)} has no adapter.")
    pieces = _of_one_rank(pieces)
    first = pieces[next(iter(place.modules))]
    for index, piece in pieces.items():
        if (piece.method, piece.scale) != (first.method, first.scale):
            raise ValueError(
                f"{place.path} is one weight for all of its stack: {place.modules[index][0]} has {piece.method} and a "
                f"scale of {piece.scale}, and the first module {first.method} and {first.scale}."
            )
    factors = {}
    for name in first.flat:
        arrays = np.stack([pieces[index].flat[name] for index in place.modules])
        factors[name] = arrays.reshape(*place.sizes("stack")[: place.loops], *arrays.shape[1:])
    if not (isinstance(first.method, LoRA) and first.method.groups > 1):
        table = TERMS[kind(first.method, place.is_matrix)]
        factors = {name: _split(array, table[name], place) for name, array in factors.items()}
    else:
        a = factors["a"]
        stack = len(place.sizes("stack"))
        factors["a"] = a.reshape(*a.shape[:stack], *place.sizes("in"), *a.shape[stack + 1 :])
    if isinstance(first.method, Full):
        order = [k for role in ("stack", "in", "out") for k in place.axes(role)]
        factors = {name: array.transpose(np.argsort(order)) for name, array in factors.items()}
    arrays: Any = factors
    return Update(arrays, first.method, place.weight.roles, place.weight.shape, scale=first.scale)


def _of_one_rank(pieces: Mapping[Index, Piece]) -> Mapping[Index, Piece]:
    """The same, where they are plain LoRAs of several ranks or scales with one rank and scale."""
    methods = {index: piece.method for index, piece in pieces.items()}
    loras = {index: method for index, method in methods.items() if type(method) is LoRA and method.groups == 1}
    alike = len({(method, pieces[index].scale) for index, method in methods.items()}) == 1
    if alike or len(loras) < len(pieces) or len({method.dropout for method in loras.values()}) > 1:
        return pieces
    rank, scales = max(method.rank for method in loras.values()), [_scale(piece) for piece in pieces.values()]
    unit = max(scales, key=abs) or 1.0
    if any(abs(math.frexp(scale / unit)[0]) != 0.5 for scale in scales):  # which bfloat16 would round
        pieces = {index: _in_float32(piece) for index, piece in pieces.items()}
    return {index: widened(piece, rank, unit) for index, piece in pieces.items()}


def _in_float32(piece: Piece) -> Piece:
    b = piece.flat["b"]
    return dataclasses.replace(piece, flat=piece.flat | {"b": b.astype(np.promote_types(b.dtype, np.float32))})


def widened(piece: Piece, rank: int, scale: float) -> Piece:
    """A LoRA with zeros up to a rank, and of a scale, the rest of it in B."""
    assert isinstance(piece.method, LoRA)
    a, b = piece.flat["a"], piece.flat["b"]
    more, ratio = rank - piece.method.rank, _scale(piece) / scale
    a = np.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, more)])
    b = np.pad(b * b.dtype.type(ratio), [*[(0, 0)] * (b.ndim - 2), (0, more), (0, 0)])
    return Piece(LoRA(rank, scale * rank, dropout=piece.method.dropout), 1.0, {"a": a, "b": b})


class Part(NamedTuple):
    """What is written for one module."""

    place: Place
    piece: Piece


def common(parts: Mapping[str, Part], field: str) -> Any:
    """What all methods have in common."""
    values = {name: getattr(part.piece.method, field) for name, part in parts.items()}
    if len(set(values.values())) > 1:
        raise ValueError(f"PEFT has one {field} for all modules, and the adapter has {values}.")
    return next(iter(values.values()))
