"""What a library makes of each kind of weight and of program: correct, wrong, refused or silently skipped.

A module of a library gives `attempt`, and calls `main(attempt)`. It needs JAX and this checkout, not jlora.

correct             values and gradients of the factors are those of the program with W + s A B
wrong               they are not, and no error says so
refused             an error or a warning says that the library cannot do it, or the library has no layer for it
silently skipped    no factors for a weight, or an output that ignores them, without a word
"""

import json
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.programs import PROGRAMS, Program
from tests.support.weight_uses import KINDS, Kind

Tree = Any
Outcome = dict[str, str]

RANK, SCALE = 2, 2.0
ALPHA = RANK * SCALE
OUTCOMES = ("correct", "wrong", "refused", "silently skipped")


class Attempt(NamedTuple):
    """One kind of weight in one kind of program, adapted by a library.

    Arguments:
        side: `side(params, adapter, inputs) -> y`, the adapted program.
        adapter: the factors, as arrays or as their shapes.
        change: `change(adapter) -> {weight: s A B}`, written by hand; a weight without factors is not in it.
    """

    side: Callable[[Tree, Tree, Tree], Tree]
    adapter: Tree
    change: Callable[[Tree], dict[str, jax.Array]]


Attempts = Callable[[Kind, Program, Tree, Tree], Attempt]


def cases() -> Iterator[tuple[Program, Kind]]:
    """Every kind of weight on its own, and a kernel in every kind of program."""
    kernel = next(kind for kind in KINDS if kind.name == "kernel")
    yield from ((PROGRAMS[0], kind) for kind in KINDS)
    yield from ((program, kernel) for program in PROGRAMS[1:])


def outcome(attempt: Attempts, program: Program, kind: Kind) -> Outcome:
    """What the library makes of one case, with its words if it refuses."""
    rng = np.random.default_rng(zlib.crc32(f"{program.name} {kind.name}".encode()))
    params, x = kind.values(rng, program.copies)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = attempt(kind, program, params, x)
            adapter = jax.tree.map(lambda s: np.asarray(0.5 * rng.normal(size=s.shape), s.dtype), made.adapter)
            missing = sorted(set(kind.weights) - set(jax.eval_shape(made.change, adapter)))
            adapter = jax.tree.map(
                lambda s: np.asarray(0.5 * rng.normal(size=s.shape), s.dtype), program.stacked(adapter)
            )
            got = derivatives(program, made.side, params, adapter, x)
        except Exception as error:
            return {"outcome": "refused", "words": words(error)}
    want = derivatives(program, reference(kind, program, made.change), params, adapter, x)
    bound = 0.05 if kind.coarse else 1e-4
    if not missing and apart(got, want) <= bound:
        return {"outcome": "correct"}
    base = derivatives(program, reference(kind, program, lambda adapter: {}), params, adapter, x)
    skipped = bool(missing) or apart(got[:1], base[:1]) <= bound
    warned = [w for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    if skipped and warned:
        return {"outcome": "refused", "words": words(warned[0].message)}
    if skipped:
        return {"outcome": "silently skipped", "words": f"no factors for {', '.join(missing)}" if missing else ""}
    return {"outcome": "wrong"}


def reference(kind: Kind, program: Program, change: Callable[[Tree], Tree]) -> Callable[[Tree, Tree, Tree], Tree]:
    """The program on parameters to which the change is added."""
    fun = program.build(kind.use)

    def side(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return fun(params | {name: params[name] + delta for name, delta in change(adapter).items()}, x)

    return side


def derivatives(program: Program, side: Callable[..., Tree], params: Tree, adapter: Tree, x: Tree) -> tuple[Tree, Tree]:
    """The output, and its derivative: for the factors, or along one direction of them if JAX has only that."""

    def both(params: Tree, adapter: Tree, x: Tree) -> tuple[Tree, Tree]:
        def f(adapter: Tree) -> Tree:
            return program.around(side)(params, adapter, x)

        if program.forward:
            return jax.jvp(f, (adapter,), (directions(adapter),))
        value, pull = jax.vjp(f, adapter)
        return value, pull(directions(value))[0]

    return jax.tree.map(np.asarray, jax.jit(both)(params, adapter, x))


def directions(tree: Tree) -> Tree:
    """Numbers in [0.5, 1.5) in the shape of a tree, the same ones at each call."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree)


def apart(got: Tree, want: Tree) -> float:
    """The largest difference in units of the largest entry of a part, infinite if trees or NaNs differ."""
    gap = 0.0
    for left, right in zip(got, want, strict=True):
        leaves, expected = jax.tree.leaves(left), jax.tree.leaves(right)
        if [a.shape for a in leaves] != [a.shape for a in expected]:
            return np.inf
        pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(leaves, expected, strict=True)]
        if any((np.isfinite(a) != np.isfinite(b)).any() for a, b in pairs):
            return np.inf
        top = max((np.abs(b[np.isfinite(b)]).max(initial=0) for _, b in pairs), default=0)
        for a, b in pairs:
            gap = max(gap, np.abs(a - b)[np.isfinite(b)].max(initial=0) / (top or 1))
    return float(gap)


def words(error: Any) -> str:
    """The first line of an error or of a warning, without folders."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {re.sub(r'(/[^/ ]+)+/', '', lines[0])[:160]}".rstrip(": ")


def runs_here(program: Program, kind: Kind) -> str:
    """Why the program does not run in this release of JAX, without any library; empty if it does."""
    params, x = kind.values(np.random.default_rng(0), program.copies)
    try:
        jax.eval_shape(lambda p, x: program.around(reference(kind, program, lambda a: {}))(p, {}, x), params, x)
    except Exception as error:
        return words(error)
    return ""


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages; those that are absent are left out."""
    out = {}
    for package in packages:
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    return out


def main(attempt: Attempts, *packages: str) -> None:
    """Tries every case, or those named after the file on the command line, and writes the outcomes to the file."""
    jax.config.update("jax_platforms", "cpu")
    rows: dict[str, dict[str, Outcome]] = {"weights": {}, "programs": {}}
    wanted = sys.argv[2:]
    for program, kind in cases():
        section, name = ("weights", kind.name) if program.name == "bare" else ("programs", program.name)
        if wanted and name not in wanted:
            continue
        absent = "" if program.adapters else runs_here(program, kind)
        row = {"outcome": "", "words": absent} if absent else outcome(attempt, program, kind)
        rows[section][name] = row
        print(section, name, *row.values(), sep="; ", flush=True)
    result = {"versions": versions("jax", *packages), **rows}
    Path(sys.argv[1]).write_text(json.dumps(result, indent=2) + "\n")
