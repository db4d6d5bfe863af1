"""FLOPs of products and collectives of a compiled program, over all iterations of its loops, from its HLO text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,<=]*)\]")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and shape, as one device runs them in one step.

    Arguments:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all`, `ragged-all-to-all`, `collective-permute`.
        shape: the array that is gathered, reduced or sent, on one device, as HLO writes it.
        bytes: the size of that array.
        count: how often the collective runs.
        exact: whether the count is exact. If not, loops of unknown length and branches count once.
    """

    kind: str
    shape: str
    bytes: int
    count: int
    exact: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program does in one run on one device.

    Arguments:
        flops: of products and convolutions.
        exact: whether the lengths of all loops with products in them are known. Other loops count once.
        collectives: the collectives, in descending order of bytes.
    """

    flops: float
    exact: bool
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of HLO: `[ROOT] %name = type opcode(arguments), attributes`."""

    name: str
    is_root: bool
    type: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        match = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return match[1] if match else ""


_Computation = dict[str, _Instruction]


def cost(text: str) -> Cost:
    """Reads the text of an optimised module."""
    computations, entry = _parse(text)
    run_counts = _run_counts(computations, entry)
    flops, exact = 0.0, True
    collectives: dict[object, Collective] = {}
    for name, computation in computations.items():
        count, is_exact = run_counts.get(name, (0, True))
        types = {i.name: i.type for i in computation.values()}
        for i in computation.values() if count else ():
            work = _flops(i, types)
            flops += count * work
            exact &= is_exact or not work
            kind = i.opcode.removesuffix("-start")
            if kind in KINDS:
                # The TPU splits an asynchronous collective over several computations with one channel.
                channel = re.search(r"channel_id=(\d+)", i.attributes)
                key = (kind, channel[1]) if channel else (name, i.name)
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind
                most = max(count, collectives[key].count) if key in collectives else count
                collectives[key] = Collective(kind, *_transferred(i, types), most, is_exact)
    return Cost(flops, exact, _totals(collectives.values()))


def _totals(runs: Iterable[Collective]) -> tuple[Collective, ...]:
    """Collectives of one kind and shape as one, in descending order of bytes."""
    totals: dict[tuple[str, str, int], Collective] = {}
    for c in runs:
        key = c.kind, c.shape, c.bytes
        before = totals.get(key, Collective(*key, count=0, exact=True))
        totals[key] = Collective(*key, count=before.count + c.count, exact=before.exact and c.exact)
    return tuple(sorted(totals.values(), key=lambda c: (-c.bytes * c.count, c.kind, c.shape, c.bytes)))


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
    """The position of the parenthesis that closes the first one."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"No parenthesis closes the first one of {text[:100]!r}.")


def _run_counts(computations: dict[str, _Computation], entry: str) -> dict[str, tuple[int, bool]]:
    """How often each computation runs in one run of the entry, and whether that number is exact."""
    counts: dict[str, tuple[int, bool]] = {entry: (1, True)}
    for name in reversed(computations):  # HLO prints a computation before those that call it
        if name not in counts:
            continue
        count, exact = counts[name]
        for i in computations[name].values():
            trips = _trip_count(i, computations[name], computations) if i.opcode == "while" else 1
            exact_inside = exact and trips is not None and i.opcode != "conditional"
            for inner in _called(i):
                before, exact_before = counts.get(inner, (0, True))
                counts[inner] = (before + count * (trips or 1), exact_before and exact_inside)
    return counts


def _called(i: _Instruction) -> list[str]:
    """The computations that an instruction runs."""
    if i.opcode in ("async-update", "async-done"):
        return []
    return [name for called in _CALLED.findall(i.attributes) for name in re.findall(r"[\w.-]+", called)]


def _trip_count(loop: _Instruction, computation: _Computation, computations: dict[str, _Computation]) -> int | None:
    """How often a loop runs: as HLO specifies it, or else as its counter shows; None if neither does.

    The counter is an element of the loop's state that starts at a constant, is compared with a constant by `<`, and is
    increased by a constant.
    """
    specified = _TRIP_COUNT.search(loop.attributes)
    if specified:
        return int(specified[1])
    condition, body = computations[loop.attribute("condition")], computations[loop.attribute("body")]
    test, state = _root(condition), _defining(loop.operands[0], computation)
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


def _increment(body: _Computation, number: str) -> int | None:
    """By which constant a loop's body increases this element of its state, None if it does not."""
    new = _defining(_root(body).operands[int(number)], body)
    if new is None or new.opcode != "add":
        return None
    old, *added = (_defining(name, body) for name in new.operands)
    is_old = old is not None and old.opcode == "get-tuple-element" and old.attribute("index") == number
    return _constant(added[0]) if is_old else None


def _root(computation: _Computation) -> _Instruction:
    return next(i for i in computation.values() if i.is_root)


def _defining(name: str, computation: _Computation) -> _Instruction | None:
    """The instruction that computes the value with this name; copies are skipped."""
    i = computation.get(name)
    while i and i.opcode in ("copy", "bitcast"):
        i = computation.get(i.operands[0])
    return i


def _constant(i: _Instruction | None) -> int | None:
    return int(i.arguments) if i and i.opcode == "constant" and re.fullmatch(r"-?\d+", i.arguments) else None


def _arrays(shape: str) -> list[tuple[int, tuple[int, ...]]]:
    """For every array in a type: the bits of an element, and the shape."""
    return [
        (int(bits or 8), tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
        for _, bits, dims in _SHAPE.findall(shape)
    ]


def _bytes(shape: str) -> int:
    return sum(-(-bits * math.prod(dims) // 8) for bits, dims in _arrays(shape))


def _transferred(i: _Instruction, types: dict[str, str]) -> tuple[str, int]:
    """The larger of a collective's operands and results, and its bytes."""
    operands, results = ", ".join(types.get(name, "") for name in i.operands), i.type
    if i.opcode in ("all-gather-start", "collective-permute-start"):  # (operands, results, ...)
        arrays, count = _names(results), len(_arrays(operands))
        results = ", ".join(arrays[count : 2 * count])
    larger = max(results, operands, key=_bytes)
    counts = collections.Counter(_names(larger))
    return " + ".join(f"{n}x {name}" if n > 1 else name for name, n in counts.items()), _bytes(larger)


def _names(shape: str) -> list[str]:
    return [match[0] for match in _SHAPE.finditer(shape)]


def _flops(i: _Instruction, types: dict[str, str]) -> float:
    """FLOPs of a product or a convolution, two for each multiply-add; 0 for any other instruction."""
    if i.opcode not in ("dot", "convolution"):
        return 0.0
    ((_, out),) = _arrays(i.type)
    left, right = (_arrays(types[name])[0][1] for name in i.operands)
    if i.opcode == "dot":
        inner = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        return 2.0 * math.prod(out) * math.prod(left[int(k)] for k in inner[1].split(",") if k) if inner else 0.0
    return 2.0 * _convolution(i.attributes, left, right, out)


def _convolution(attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Multiplications of a convolution, without those by padding and by the holes of a dilated input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, attributes
    window = (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]
    fields = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_-]+)", window)}
    taps = 1
    for k in sorted(int(c) for c in labels[2] if c.isdigit()):
        length, size, n = (
            shape[label.index(str(k))]
            for shape, label in zip((left, right, out), (labels[1], labels[2], labels[3]), strict=True)
        )
        taps *= _taps({key: values[k] for key, values in fields.items()}, length, size, n)
    batch, features, channels = out[labels[3].index("b")], out[labels[3].index("f")], right[labels[2].index("i")]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return taps * batch * features * channels // (int(groups[1]) if groups else 1)


def _taps(window: dict[str, str], length: int, size: int, outputs: int) -> int:
    """Along one spatial axis, how many pairs of an output and an entry of the kernel meet an entry of the input."""
    stride, dilation = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    kernel_dilation, low = int(window.get("rhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    positions = (o * stride + t * kernel_dilation - low for o in range(outputs) for t in range(size))
    return sum(p % dilation == 0 and 0 <= p // dilation < length for p in positions)
