"""Weights that a program for GPUs dequantises: how many bytes of them there are at one time, and what uses them."""

import dataclasses
import re

from jlora._plan.hlo import Computation, Instruction, Program, array_names, size_in_bytes
from jlora._plan.kernels import fused, has_product, is_kernel

_CODES = re.compile(r"[us][48]\[\d+,\d+")  # a matrix of 4 or 8 bits; the workspaces of libraries are vectors
_VIEWS = ("bitcast", "get-tuple-element")
_CALLS = ("while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Dequantised:
    """The float arrays that kernels compute from matrices of 4 and 8 bits, as one GPU runs them in one step.

    Arguments:
        count: how many of them are written. What is dequantised in the kernel of its product is not.
        bytes: the most bytes of them at one time.
        kept: how many still exist when the step, or the iteration of a loop that wrote them, ends.
    """

    count: int = 0
    bytes: int = 0
    kept: int = 0


def dequantised(program: Program) -> Dequantised:
    """Reads which weights a scheduled program for GPUs dequantises."""
    count, most, kept = 0, 0, 0
    for name in program.sequential:
        computation, (times, _) = program.computations[name], program.runs[name]
        sizes, uses, kept_here = _lives(computation, program)
        count, kept = count + times * len(sizes), kept + times * kept_here
        most = max(most, _most_at_once(sizes, uses))
    return Dequantised(count, most, kept)


def _lives(computation: Computation, program: Program) -> tuple[dict[str, int], dict[str, set[str]], int]:
    """Of one computation: bytes of the arrays, the arrays that each later instruction uses, how many are kept."""
    contents: dict[str, set[str]] = {}  # value -> the dequantised arrays in it; of codes none
    sizes: dict[str, int] = {}
    uses: dict[str, set[str]] = {}
    kept: set[str] = set()
    for i in computation.values():
        operands = _operands(i, computation)
        sources = [contents[name] for name in operands if name in contents]
        uses[i.name] = set().union(*sources)
        if i.opcode in ("parameter", "get-tuple-element") and _CODES.match(i.type):
            contents[i.name] = set()
        elif sources and (i.opcode in _VIEWS or i.opcode.endswith("-done")):
            contents[i.name] = uses[i.name]
        elif sources and _computes(i, computation, program):
            size = sum(size_in_bytes(array) for array in _results(i, computation) if not _is_integer(array))
            sizes |= {i.name: size} if size else {}
            contents[i.name] = {i.name} if size else set()
        if i.is_root or i.opcode in _CALLS:
            kept |= contents.get(i.name, uses[i.name])
    return sizes, uses, len(kept)


def _operands(i: Instruction, computation: Computation) -> list[str]:
    """What an instruction uses: of a tuple the element that it takes; a tuple itself uses nothing, its users do."""
    if i.opcode in ("tuple", "optimization-barrier") and not i.is_root:
        return []
    out = []
    for name in i.operands:
        value = computation.get(name)
        while value is not None and value.opcode == "optimization-barrier":
            value = computation.get(value.operands[0])
        if value is None or value.opcode != "tuple":
            out.append(name)
        elif i.opcode == "get-tuple-element":
            out.append(value.operands[int(i.attribute("index"))])
        else:
            out += value.operands
    return out


def _computes(i: Instruction, computation: Computation, program: Program) -> bool:
    """Whether an instruction computes something else than a product, here or on other devices."""
    if i.opcode in ("tuple", "optimization-barrier", *_CALLS):
        return False
    return not (is_kernel(i) and has_product(i, computation, fused(i, program)))


def _results(i: Instruction, computation: Computation) -> list[str]:
    """The arrays that an instruction writes; the type of some collectives begins with their operands."""
    names, inputs = array_names(i.type), [each for n in i.operands for each in array_names(computation[n].type)]
    starts = i.opcode.endswith("-start") and len(names) > len(inputs) and names[: len(inputs)] == inputs
    return names[len(inputs) :] if starts else names


def _is_integer(array: str) -> bool:
    return array.startswith(("s", "u", "pred"))


def _most_at_once(sizes: dict[str, int], uses: dict[str, set[str]]) -> int:
    """The most bytes at one time: an array exists from its kernel to its last use."""
    last = {array: name for name, arrays in uses.items() for array in arrays}
    most, now = 0, 0
    for name, arrays in uses.items():
        now += sizes.get(name, 0)
        most = max(most, now)
        now -= sum(sizes[array] for array in arrays if last[array] == name)
    return most
