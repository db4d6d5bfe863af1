"""The rows of `benchmarks.plan`: models, topologies, meshes and batches."""

import dataclasses
import math
from typing import Any

from jax.sharding import PartitionSpec

from benchmarks._llama import ROW, ROW_MAJOR, SIZES, Sizes

FORMS = ("jlora", "by hand", "merged", "base", "full")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one topology.

    Arguments:
        sizes: the sizes of the model.
        topology: the name of the topology, such as `v5e:4x4`.
        mesh: number of replicas, and of devices of each replica along `data` and along `model`.
        batch: sequences in a step.
        forms: the steps to compile: `jlora`; the same LoRA `by hand`; `merged` inside the step; the frozen `base` with
            a gradient to the embedded tokens; and `full` fine-tuning.
        rank: the rank of the LoRA.
        kernels: a pattern for the kernels that are adapted.
        base: the format of the layers' kernels: `bf16` or `nf4`.
        partition: of the kernels with a sharded input.
    """

    sizes: Sizes
    topology: str
    mesh: tuple[int, int, int]
    batch: int
    forms: tuple[str, ...] = FORMS[:3]
    rank: int = 16
    kernels: str = r"layers/(wq|wk|wv|wo|gate|up|down)"
    base: str = "bf16"
    partition: PartitionSpec = ROW


def _row(model: str, topology: str, forms: tuple[str, ...] = FORMS[:3], **changes: Any) -> Row:
    """One sequence of full length for every eight chips, over which each layer is sharded."""
    chips = _chips(topology)
    data = max(1, chips // 8)
    row = Row(SIZES[model], topology, (1, data, chips // data), data, forms)
    return dataclasses.replace(row, **changes)


def _chips(topology: str) -> int:
    return math.prod(int(n) for n in topology.split(":")[1].split("x"))


def _weak(topology: str) -> Row:
    """Weak scaling: eight layers of the 70B model on replicas of 16 chips, each with two sequences."""
    replicas = _chips(topology) // 16
    sizes = dataclasses.replace(SIZES["Llama 3 70B"], layers=8)
    return Row(sizes, topology, (replicas, 2, 8), 2 * replicas, FORMS[:1])


def _nf4(model: str, topology: str, batch: int, length: int) -> Row:
    """A base in 4 bits, on few chips."""
    sizes = dataclasses.replace(SIZES[model], length=length)
    return _row(model, topology, sizes=sizes, batch=batch, base="nf4")


CARDS = ("h100", "h200", "b200", "a100-80", "a100-40", "rtx6000pro", "a6000", "l40s", "l4", "rtx4090")

BLOCK = Sizes(8, 4096, 14336, 32, 8, length=2048)
WEAK = ("4x4", "4x8", "8x8", "8x16", "16x16")
PAPER = {"rank": 4, "kernels": r"layers/(wq|wv)"}

# The largest slice that does not hold the step (None if the smallest slice does), and the smallest that holds it.
SMALLEST: dict[tuple[str, str], dict[str, tuple[str | None, str]]] = {
    ("Llama 3 8B", "bf16"): {"v5e": ("1x1", "2x2"), "v6e": (None, "1x1"), "v5p": (None, "2x2x1")},
    ("Llama 3 8B", "nf4"): {"v5e": (None, "1x1"), "v6e": (None, "1x1"), "v5p": (None, "2x2x1")},
    ("Llama 3 70B", "bf16"): {"v5e": ("2x4", "4x4"), "v6e": ("2x2", "2x4"), "v5p": (None, "2x2x1")},
    ("Llama 3 70B", "nf4"): {"v5e": ("1x1", "2x2"), "v6e": ("1x1", "2x2"), "v5p": (None, "2x2x1")},
    ("Llama 3 405B", "bf16"): {"v5e": ("8x8", "8x16"), "v6e": ("4x4", "4x8"), "v5p": ("2x2x2", "2x2x4")},
    ("Llama 3 405B", "nf4"): {"v5e": ("4x4", "4x8"), "v6e": ("2x4", "4x4"), "v5p": (None, "2x2x1")},
}


# The smallest number of cards, in hosts of at most eight, that holds the step in the 75% of the memory that JAX takes;
# before it, where arguments alone do not show that fewer cards do not, the next smaller number. Bars check
# both when a row is compiled.
SMALLEST_GPUS: dict[tuple[str, str], dict[str, tuple[str | None, str]]] = {
    ("Llama 3 8B", "bf16"): {
        **dict.fromkeys(("h100", "h200", "b200", "a100-80", "a100-40", "rtx6000pro", "a6000", "l40s"), (None, "1")),
        "l4": (None, "2"),
        "rtx4090": ("1", "2"),
    },
    ("Llama 3 8B", "nf4"): dict.fromkeys(CARDS, (None, "1")),
    ("Llama 3 70B", "bf16"): {
        **dict.fromkeys(("h100", "a100-80"), (None, "4")),
        **dict.fromkeys(("h200", "b200"), (None, "2")),
        "rtx6000pro": ("2", "4"),
        **dict.fromkeys(("a100-40", "a6000", "l40s"), (None, "8")),
        **dict.fromkeys(("l4", "rtx4090"), (None, "2x8")),
    },
    ("Llama 3 70B", "nf4"): {
        **dict.fromkeys(("h100", "h200", "b200", "a100-80", "rtx6000pro"), (None, "1")),
        **dict.fromkeys(("a100-40", "a6000", "l40s"), (None, "2")),
        **dict.fromkeys(("l4", "rtx4090"), (None, "4")),
    },
    ("Llama 3 405B", "bf16"): {
        **dict.fromkeys(("h100", "a100-80", "rtx6000pro"), (None, "2x8")),
        **dict.fromkeys(("h200", "b200"), (None, "8")),
        **dict.fromkeys(("a100-40", "a6000", "l40s"), (None, "4x8")),
        "l4": ("8x8", "16x8"),
        "rtx4090": (None, "8x8"),
    },
    ("Llama 3 405B", "nf4"): {
        **dict.fromkeys(("h100", "a100-80", "a6000", "l40s"), (None, "8")),
        "h200": (None, "4"),
        "b200": (None, "2"),
        "rtx6000pro": (None, "4"),
        "a100-40": (None, "2x8"),
        **dict.fromkeys(("l4", "rtx4090"), (None, "4x8")),
    },
}


def slice_name(model: str, base: str, topology: str) -> str:
    """The name of a row of `SMALLEST`, such as `8B nf4 v5e:1x1`."""
    return f"{model.split()[-1]} {base} {topology}"


def _smallest(slices: dict[tuple[str, str], dict[str, tuple[str | None, str]]], **changes: Any) -> dict[str, Row]:
    out = {}
    for (model, base), generations in slices.items():
        for generation, (too_small, smallest) in generations.items():
            for shape, forms in ((too_small, FORMS[:1]), (smallest, FORMS[:3])):
                if shape is not None:
                    topology = f"{generation}:{shape}"
                    out[slice_name(model, base, topology)] = _row(model, topology, forms, base=base, **changes)
    return out


ROWS = {
    "block": Row(BLOCK, "v5e:1x1", (1, 1, 1), 4),
    "70B v5e:16x16": _row("Llama 3 70B", "v5e:16x16", FORMS[:4]),
    "70B nf4 v5e:4x4": _nf4("Llama 3 70B", "v5e:4x4", batch=16, length=2048),
    **{f"weak {n}": _weak(f"v5e:{n}") for n in WEAK},
    "405B v5p:8x8x8": _row("Llama 3 405B", "v5p:8x8x8"),
    "GPT-3 v5p:4x4x4": _row("GPT-3 175B", "v5p:4x4x4", ("jlora", "by hand", "merged", "full"), **PAPER),
    **_smallest(SMALLEST),
    "8B bf16 h100:2": _row("Llama 3 8B", "h100:2", partition=ROW_MAJOR),
    **_smallest(SMALLEST_GPUS, partition=ROW_MAJOR),
}
