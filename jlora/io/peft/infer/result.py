"""The map that `infer_names` returns."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jlora._interpreter.context import Role
from jlora.io.peft.infer.entries import Checkpoint, NoEntryError, exact_entry
from jlora.io.peft.infer.patterns import ExactEntry, templates_of
from jlora.io.peft.infer.pieces import Piece, assemble_parameter, assemble_tensor
from jlora.io.peft.infer.templates import LETTERS
from jlora.io.peft.infer.words import words
from jlora.io.torch.module_names import Entry, Names
from jlora.io.torch.weight_location import Weight


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InferredNames(Mapping[str, Any]):
    """A map from parameters to the tensors of a checkpoint, as `infer_names` found it.

    It is a mapping of patterns to modules, so it is accepted wherever `jlora.peft` takes names, and `dict(names)` is
    what you would have written by hand. An entry of yours is added by `names | {"head/kernel": "lm_head"}`.

    What every parameter is made of is in `leaves`, exactly and both ways:

        parameter = np.zeros(shape, dtype)                 # from the checkpoint to the program
        for piece in names.leaves[path]:
            piece.to_parameter(checkpoint[piece.tensor], parameter)

        tensor = np.array(checkpoint[name])                # from the program to the checkpoint
        for path, pieces in names.leaves.items():
            for piece in pieces:
                if piece.tensor == name:
                    piece.to_tensor(np.asarray(params[path]), tensor)

    `names.parameter(path, read)` and `names.tensor(name, tensor, read)` are these two loops. Blocks of a tensor that no
    piece covers keep what the checkpoint has; a tensor in `copies` takes the new value of the one that it copies.

    Attributes:
        leaves: the pieces of every parameter that was found, by path.
        shapes: of all floating-point parameters, by path.
        dtypes: of all floating-point parameters, by path.
        copies: tensors that no parameter needed, with the tensor of the same values that one was made of: an output
            head that is tied to the embedding.
        shared: parameters that are made of a tensor which an earlier parameter is made of too, with the path of that.
        constant: parameters whose elements are all equal and that have no tensor, with their value: biases of zeros
            that the checkpoint lacks.
        ambiguous: parameters that may come from several tensors, with their names.
        unmatched: parameters that come from no tensor, with the reason and the nearest tensors.
        unused: floating-point tensors that no parameter needed.
        inexpressible: parameters whose pieces are known, but that no entry for PEFT describes, with the reason.
    """

    leaves: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, Any]
    copies: Mapping[str, str]
    shared: Mapping[str, str]
    constant: Mapping[str, float]
    ambiguous: Mapping[str, tuple[str, ...]]
    unmatched: Mapping[str, str]
    unused: tuple[str, ...]
    checkpoint: Checkpoint
    added: Names = dataclasses.field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every parameter was found, or is constant and has no tensor."""
        return not self.ambiguous and not self.unmatched

    def check(self) -> "InferredNames":
        """The map itself, if it is complete.

        Raises:
            ValueError: with every parameter that was not found, and what to do.
        """
        if not self.complete:
            raise ValueError("\n".join(_problems(self)))
        return self

    def parameter(self, path: str, read: Any) -> np.ndarray:
        """A parameter from the checkpoint; `read(name)` gives a tensor. Zeros in padding."""
        return assemble_parameter(self.leaves[path], self.shapes[path], self.dtypes[path], read)

    def tensor(self, name: str, tensor: np.ndarray, read: Any) -> np.ndarray:
        """A tensor with the values of the parameters; `read(path)` gives a parameter.

        Arguments:
            name: of the tensor.
            tensor: as the checkpoint has it; not changed.
            read: called for the parameters that hold a piece of it.
        """
        return assemble_tensor(self.copies.get(name, name), self.leaves, tensor, read)

    def __or__(self, entries: Names) -> "InferredNames":
        return dataclasses.replace(self, added={**self.added, **entries})

    def __getitem__(self, pattern: str) -> Any:
        return self._entries[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @functools.cached_property
    def _entries(self) -> dict[str, Entry]:
        exact, _ = self._exact({})
        return {**self.added, **templates_of(exact)}

    @functools.cached_property
    def inexpressible(self) -> dict[str, str]:
        return self._exact({})[1]

    @functools.cached_property
    def _ordered(self) -> list[str]:
        """The paths in the order of their tensors in the checkpoint.

        The parameters of experts have to be in the order in which their module defines them, and a file may have them
        in alphabetical order: gate and up come before down.
        """
        position = {name: number for number, name in enumerate(self.checkpoint.shapes)}
        first: dict[str, int] = {}
        for name, number in position.items():
            first.setdefault(name.rpartition(".")[0], number)

        def key(path: str) -> tuple[int, bool, int]:
            name = self.leaves[path][0].tensor
            module, _, last = name.rpartition(".")
            return first[module], "down" in words(last), position[name]

        return sorted(self.leaves, key=key)

    def _exact(self, weights: Mapping[str, Weight]) -> tuple[dict[str, ExactEntry], dict[str, str]]:
        """The entry of every parameter that has one, and why the others have none."""
        entries: dict[str, ExactEntry] = {}
        reasons: dict[str, str] = {}
        for path in self._ordered:
            pieces = self.leaves[path]
            if path in self.shared:
                reasons[path] = f"it is made of {pieces[0].tensor}, of which {self.shared[path]} is made too"
                continue
            roles: tuple[Role, ...] = weights[path].roles if path in weights else ()
            try:
                entries[path] = exact_entry(path, pieces, self.checkpoint, roles)
            except NoEntryError as error:
                reasons[path] = str(error)
        return entries, reasons

    def for_weights(self, weights: Mapping[str, Weight], used: Iterable[str]) -> Names:
        """The same map with the kinds of modules that the roles of a program's weights give.

        Arguments:
            weights: by path.
            used: the paths that must have an entry.

        Raises:
            ValueError: if one of them has none; the message names it, and what to do.
        """
        exact, reasons = self._exact(weights)
        for path in used:
            self._check_used(path, exact, reasons)
        return {**self.added, **{path: entry.rendered(LETTERS) for path, entry in exact.items()}}

    def _check_used(self, path: str, exact: Mapping[str, ExactEntry], reasons: Mapping[str, str]) -> None:
        if path in exact or path in self.added:
            return
        remedy = f"Give it an entry, names | {{{path!r}: 'the.torch.module'}}, or leave it out of the adapter."
        if path in self.ambiguous:
            options = ", ".join(self.ambiguous[path])
            raise ValueError(
                f"{path} may be any of {options}: they have the same values. Choose one, infer_names(params, "
                f"checkpoint, known={{{path!r}: {self.ambiguous[path][0].split(',')[0]!r}}})."
            )
        if path in self.unmatched:
            raise ValueError(f"{path} has no tensor in the checkpoint: {self.unmatched[path]}. {remedy}")
        if path in self.constant:
            raise ValueError(
                f"{path} is {self.constant[path]:g} everywhere, and the checkpoint has no tensor for it. {remedy}"
            )
        if path in reasons:
            raise ValueError(f"{path} has no entry for PEFT: {reasons[path]}. {remedy}")

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{pattern!r}: {entry!r}," for pattern, entry in self.items()]
        lines += _problems(self)
        lines += [f"no entry for PEFT: {path}: {reason}" for path, reason in self.inexpressible.items()]
        if self.unused:
            lines.append(f"unused tensors: {', '.join(self.unused)}")
        return "\n".join(lines)


def _problems(names: InferredNames) -> list[str]:
    """A line for every parameter without a tensor, and what to do."""
    lines = [f"{path} was not found: {reason}" for path, reason in names.unmatched.items()]
    for path, options in names.ambiguous.items():
        lines.append(f"{path} may be any of {', '.join(options)}: state it, known={{{path!r}: {options[0]!r}}}")
    return lines


def for_weights(names: Names, weights: Mapping[str, Weight], used: Iterable[str] = ()) -> Names:
    """A map for the weights of a program; one that was written by hand is returned as it is.

    Arguments:
        names: the map.
        weights: by path.
        used: the paths that must have an entry.

    Raises:
        ValueError: if an inferred map has no entry for one of them.
    """
    return names.for_weights(weights, used) if isinstance(names, InferredNames) else names


def unnamed_weights(names: Names, modules: Iterable[str]) -> list[str]:
    """What to write for modules that an inferred map has no entry for: one line for each parameter they may belong to.

    Arguments:
        names: the map.
        modules: of a file, without a weight in the program.
    """
    if not isinstance(names, InferredNames):
        return []
    hints = []
    for module in modules:
        tensors = {module, f"{module}.weight"}
        hints += [
            f"known={{{path!r}: {option!r}}} in infer_names"
            for path, options in names.ambiguous.items()
            for option in options
            if names.checkpoint.rename(option) in tensors
        ]
        hints += [
            f"names | {{{path!r}: {module!r}}}, if that is right: {reason}"
            for path, reason in names.inexpressible.items()
            if tensors & {names.checkpoint.rename(piece.tensor) for piece in names.leaves[path]}
        ]
    return hints
