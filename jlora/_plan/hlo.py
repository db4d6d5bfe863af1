"""What a compiled program does, from the text of its HLO: FLOPs of products, and collectives, loops multiplied out."""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and shape, as one chip runs them in one step.

    Arguments:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `ragged-all-to-all`, `collective-permute`.
        shape: of what is gathered, reduced or sent, on one chip, as HLO writes it.
        bytes: its size.
        count: how often it runs.
        exact: whether the count is; where it is not, a loop of unknown length or a branch counts once.
    """

    kind: str
    shape: str
    bytes: int
    count: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program does in one run on one chip.

    Arguments:
        flops: of products and convolutions.
        exact: whether the lengths of all loops with products in them are known; the others count once.
        collectives: the collectives, the heaviest first.
    """

    flops: float
    exact: bool
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    root: bool
    type: str
    opcode: str
    inside: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.inside)

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return found[1] if found else ""


_Computation = dict[str, _Instruction]


def cost(text: str) -> Cost:
    """Reads the text of an optimised module."""
    computations, entry = _parse(text)
    runs = _runs(computations, entry)
    flops, exact = 0.0, True
    found: dict[object, tuple[str, str, int, int, bool]] = {}
    for name, computation in computations.items():
        count, known = runs.get(name, (0, True))
        types = {i.name: i.type for i in computation.values()}
        for i in computation.values():
            work = _flops(i, types) if count else 0
            flops += count * work
            exact &= known or not work
            kind = i.opcode.removesuffix("-start")
            if count and kind in KINDS:
                # The TPU spreads an asynchronous collective over several computations, under one channel.
                channel = re.search(r"channel_id=(\d+)", i.rest)
                key = (kind, channel[1]) if channel else (name, i.name)
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                before = found[key][3] if key in found else 0
                found[key] = (kind, *_moved(i, types), max(count, before), known)
    totals: collections.Counter[tuple[str, str, int]] = collections.Counter()
    sure: dict[tuple[str, str, int], bool] = {}
    for kind, shape, size, count, known in found.values():
        totals[kind, shape, size] += count
        sure[kind, shape, size] = sure.get((kind, shape, size), True) and known
    heaviest = sorted(totals, key=lambda key: (-key[2] * totals[key], key))
    return Cost(flops, exact, tuple(Collective(*key, totals[key], sure[key]) for key in heaviest))


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    """The instructions of every computation, and the name of the entry."""
    computations: dict[str, _Computation] = {}
    current, entry = "", ""
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current][match[2]] = _instruction(match[2], bool(match[1]), line[match.end() :])
    return computations, entry


def _instruction(name: str, root: bool, text: str) -> _Instruction:
    kind_of, text = (text[: _close(text) + 1], text[_close(text) + 2 :]) if text[0] == "(" else text.split(" ", 1)
    opcode, text = text.split("(", 1)
    end = _close("(" + text) - 1
    return _Instruction(name, root, kind_of, opcode.strip(), text[:end], text[end + 1 :])


def _close(text: str) -> int:
    """Where the first parenthesis is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"A parenthesis stays open in {text[:100]!r}.")


def _runs(computations: dict[str, _Computation], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs in one run of the entry, and whether that is sure."""
    runs: dict[str, tuple[int, bool]] = {entry: (1, True)}
    for name in reversed(computations):  # HLO prints a computation before those that call it
        if name not in runs:
            continue
        count, known = runs[name]
        for i in computations[name].values():
            trips = _trips(i, computations[name], computations) if i.opcode == "while" else 1
            sure = known and trips is not None and i.opcode != "conditional"
            for inner in _called(i):
                before, was = runs.get(inner, (0, True))
                runs[inner] = (before + count * (trips or 1), was and sure)
    return runs


def _called(i: _Instruction) -> list[str]:
    """The computations that an instruction runs."""
    if i.opcode in ("async-update", "async-done"):
        return []
    return [name for called in _CALLED.findall(i.rest) for name in re.findall(r"[\w.-]+", called)]


def _trips(loop: _Instruction, around: _Computation, computations: dict[str, _Computation]) -> int | None:
    """How often a loop runs: as HLO says, or by its counter, from a constant by a constant to below a constant."""
    said = _TRIPS.search(loop.rest)
    if said:
        return int(said[1])
    condition, body = computations[loop.field("condition")], computations[loop.field("body")]
    test, start = _root(condition), _behind(loop.operands[0], around)
    if test.opcode != "compare" or test.field("direction") != "LT" or start is None or start.opcode != "tuple":
        return None
    counter = _behind(test.operands[0], condition)
    at = counter.field("index") if counter and counter.opcode == "get-tuple-element" else ""
    after = _behind(_root(body).operands[int(at)], body) if at else None
    if after is None or after.opcode != "add":
        return None
    first, *rest = (_behind(name, body) for name in after.operands)
    by = _constant(rest[0]) if first and first.opcode == "get-tuple-element" and first.field("index") == at else None
    low, high = _constant(_behind(start.operands[int(at)], around)), _constant(_behind(test.operands[1], condition))
    return None if by is None or low is None or high is None or by <= 0 else max(0, -(-(high - low) // by))


def _root(computation: _Computation) -> _Instruction:
    return next(i for i in computation.values() if i.root)


def _behind(name: str, computation: _Computation) -> _Instruction | None:
    """The instruction whose value a name has, copies left out."""
    i = computation.get(name)
    while i and i.opcode in ("copy", "bitcast"):
        i = computation.get(i.operands[0])
    return i


def _constant(i: _Instruction | None) -> int | None:
    return int(i.inside) if i and i.opcode == "constant" and re.fullmatch(r"-?\d+", i.inside) else None


def _arrays(shape: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bits of an element and shape of every array in a type."""
    return [
        (int(bits or 8), tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
        for _, bits, dims in _SHAPE.findall(shape)
    ]


def _bytes(shape: str) -> int:
    return sum(-(-bits * math.prod(dims) // 8) for bits, dims in _arrays(shape))


def _moved(i: _Instruction, types: dict[str, str]) -> tuple[str, int]:
    """The larger side of a collective, operands or results, and its bytes."""
    given = ", ".join(types.get(name, "") for name in i.operands)
    made = i.type
    if i.opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, ...)
        arrays = list(_SHAPE.finditer(made))
        count = len(_arrays(given))
        made = ", ".join(match[0] for match in arrays[count : 2 * count])
    side = max(made, given, key=_bytes)
    return " + ".join(f"{n}x {s}" if n > 1 else s for s, n in collections.Counter(_names(side)).items()), _bytes(side)


def _names(shape: str) -> list[str]:
    return [match[0] for match in _SHAPE.finditer(shape)]


def _flops(i: _Instruction, types: dict[str, str]) -> float:
    """FLOPs of a product or a convolution, two to a multiplication with its addition; 0 of anything else."""
    if i.opcode not in ("dot", "convolution"):
        return 0.0
    ((_, out),) = _arrays(i.type)
    left, right = (_arrays(types[name])[0][1] for name in i.operands)
    if i.opcode == "dot":
        inner = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)
        return 2.0 * math.prod(out) * math.prod(left[int(k)] for k in inner[1].split(",") if k) if inner else 0.0
    return 2.0 * _convolution(i.rest, left, right, out)


def _convolution(rest: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Multiplications of a convolution, those with padding and with the holes of a dilation left out."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest)
    assert labels, rest
    taps = 1
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", rest) or [""])[0]))
    spatial = [c for c in labels[2] if c.isdigit()]
    fields = {key: value.split("x") for key, value in window.items()}
    for k in sorted(int(c) for c in spatial):

        def field(key: str, default: str, k: int = k) -> str:
            return fields[key][k] if key in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        size, n = right[labels[2].index(str(k))], out[labels[3].index(str(k))]
        stride, dilation = int(field("stride", "1")), int(field("lhs_dilate", "1"))
        spread, length = int(field("rhs_dilate", "1")), left[labels[1].index(str(k))]
        places = (o * stride + t * spread - low for o in range(n) for t in range(size))
        taps *= sum(p % dilation == 0 and 0 <= p // dilation < length for p in places)
    batch, features, inner = out[labels[3].index("b")], out[labels[3].index("f")], right[labels[2].index("i")]
    groups = re.search(r"batch_group_count=(\d+)", rest)
    return taps * batch * features * inner // (int(groups[1]) if groups else 1)
