"""FLOPs of products and collectives of a compiled program, over all iterations of its loops."""

import collections
import dataclasses
import re
from collections.abc import Iterable

from jlora._plan.hlo import Instruction, Program, array_names, size_in_bytes
from jlora._plan.products import product_flops

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")


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


def cost(program: Program) -> Cost:
    """What the program does in one run."""
    flops, exact = 0.0, True
    collectives: dict[object, Collective] = {}
    for name, computation in program.computations.items():
        count, is_exact = program.runs.get(name, (0, True))
        types = {i.name: i.type for i in computation.values()}
        for i in computation.values() if count else ():
            work = product_flops(i, types)
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


def _transferred(i: Instruction, types: dict[str, str]) -> tuple[str, int]:
    """The larger of a collective's operands and results, and its bytes."""
    operands, results = ", ".join(types.get(name, "") for name in i.operands), i.type
    names, inputs = array_names(results), array_names(operands)
    if i.opcode.endswith("-start") and len(names) > len(inputs) and names[: len(inputs)] == inputs:
        results = ", ".join(names[len(inputs) : 2 * len(inputs)])  # of (operands, results, ...)
    larger = max(results, operands, key=size_in_bytes)
    counts = collections.Counter(array_names(larger))
    return " + ".join(f"{n}x {name}" if n > 1 else name for name, n in counts.items()), size_in_bytes(larger)
