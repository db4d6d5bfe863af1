"""The text of an optimised HLO module: its instructions, its types, and how often each computation runs."""

import dataclasses
import functools
import math
import re

_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `[ROOT] %name = type opcode(arguments), attributes`."""

    name: str
    is_root: bool
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        """The value of an attribute, "" if it is not there."""
        match = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """An optimised module.

    Arguments:
        computations: the instructions of every computation, by name.
        entry: the name of the computation that runs first.
    """

    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, tuple[int, bool]]:
        """How often each computation runs in one run of the program, and whether that number is exact."""
        return _run_counts(self.computations, self.entry)

    @functools.cached_property
    def sequential(self) -> list[str]:
        """The computations whose instructions run one by one; not those of fusions and reductions."""
        names = [self.entry]
        for name in names:
            for i in self.computations[name].values():
                if i.opcode in ("while", "conditional", "call", "async-start"):
                    names += [inner for inner in called(i) if inner not in names]
        return names


def parse(text: str) -> Program:
    """Reads the text of an optimised module."""
    computations: dict[str, Computation] = {}
    current, entry = "", ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current][match[2]] = _instruction(match[2], bool(match[1]), line[match.end() :])
    return Program(computations, entry)


def _instruction(name: str, root: bool, text: str) -> Instruction:
    kind_of, text = (text[: _close(text) + 1], text[_close(text) + 2 :]) if text[0] == "(" else text.split(" ", 1)
    opcode, text = text.split("(", 1)
    end = _close("(" + text) - 1
    return Instruction(name, root, kind_of, opcode.strip(), text[:end], text[end + 1 :])


def _close(text: str) -> int:
    """The position of the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"No parenthesis closes the first one of {text[:100]!r}.")


def _run_counts(computations: dict[str, Computation], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs in one run of the entry, and whether that number is exact."""
    counts: dict[str, tuple[int, bool]] = {entry: (1, True)}
    for name in reversed(computations):  # HLO prints a computation before those that call it
        if name not in counts:
            continue
        count, exact = counts[name]
        for i in computations[name].values():
            trips = _trip_count(i, computations[name], computations) if i.opcode == "while" else 1
            exact_inside = exact and trips is not None and i.opcode != "conditional"
            for inner in called(i):
                before, exact_before = counts.get(inner, (0, True))
                counts[inner] = (before + count * (trips or 1), exact_before and exact_inside)
    return counts


def called(i: Instruction) -> list[str]:
    """The computations that an instruction runs."""
    if i.opcode in ("async-update", "async-done"):
        return []
    return [name for called in _CALLED.findall(i.attributes) for name in re.findall(r"[\w.-]+", called)]


def _trip_count(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: as HLO specifies it, or else as its counter shows; None if neither does.

    The counter is an element of the loop's state that starts at a constant, is compared with a constant by `<`, and is
    increased by a constant.
    """
    specified = _TRIP_COUNT.search(loop.attributes)
    if specified:
        return int(specified[1])
    condition, body = computations[loop.attribute("condition")], computations[loop.attribute("body")]
    test, state = root(condition), _defining(loop.operands[0], computation)
    if test.opcode != "compare" or test.attribute("direction") != "LT" or state is None or state.opcode != "tuple":
        return None
    counter = _defining(test.operands[0], condition)
    if counter is None or counter.opcode != "get-tuple-element":
        return None
    number = counter.attribute("index")
    step = _increment(body, number)
    start = _constant(_defining(state.operands[int(number)], computation))
    stop = _constant(_defining(test.operands[1], condition))
    if step is None or step <= 0 or start is None or stop is None:
        return None
    return max(0, math.ceil((stop - start) / step))


def _increment(body: Computation, number: str) -> int | None:
    """By which constant a loop's body increases this element of its state, None if it does not."""
    new = _defining(root(body).operands[int(number)], body)
    if new is None or new.opcode != "add":
        return None
    old, *added = (_defining(name, body) for name in new.operands)
    is_old = old is not None and old.opcode == "get-tuple-element" and old.attribute("index") == number
    return _constant(added[0]) if is_old else None


def root(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(i for i in computation.values() if i.is_root)


def _defining(name: str, computation: Computation) -> Instruction | None:
    """The instruction that computes the value with this name; copies are skipped."""
    i = computation.get(name)
    while i and i.opcode in ("copy", "bitcast"):
        i = computation.get(i.operands[0])
    return i


def _constant(i: Instruction | None) -> int | None:
    return int(i.arguments) if i and i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments) else None


def arrays(shape: str) -> list[tuple[int, tuple[int, ...]]]:
    """For every array in a type: the bits of an element, and the shape."""
    return [
        (int(bits or 8), tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
        for _, bits, dims in _SHAPE.findall(shape)
    ]


def size_in_bytes(shape: str) -> int:
    """The bytes of all arrays in a type."""
    return sum(-(-bits * math.prod(dims) // 8) for bits, dims in arrays(shape))


def array_names(shape: str) -> list[str]:
    """All arrays in a type as HLO writes them, `bf16[4,8]`."""
    return [match[0] for match in _SHAPE.finditer(shape)]
