"""The law, for every kind of weight in every kind of program, in float32 and in bfloat16.

    jlora.adapt(f)(params, adapter, *args)  ==  f(jlora.merge(params, adapter), *args)

Values, gradients with respect to the adapter and gradients with respect to the inputs; both sides under `jax.jit`; no
factor zero; and, by `on_dense="error"` and `explain`, no weight formed but where the program itself asks for it.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.draw import drawn
from tests.support.int8_rows import rounded
from tests.support.methods import METHODS, shapes_of_adapter
from tests.support.programs import PROGRAMS, Program, floats
from tests.support.weight_uses import KINDS, Kind

Tree = Any

# In units of the largest entry of a tree. In bfloat16 the two sides round different numbers: one the merged weight, the
# other the factors, the product onto the rank, the product from it and the sum. There all numbers are positive, so that
# hardly a sum cancels, and what is left is a dozen roundings in the longest programs, each by half an epsilon at most.
BOUNDS = {"float32": 2e-5, "bfloat16": 8 * 2**-7}
FREE = "bfloat16 of free reflections"

# From JAX 0.11 on this pass makes bfloat16 products that the CPU's emitter refuses (a failed check in its source).
OPTIONS: dict[str, Any] = {"xla_disable_hlo_passes": "algsimp"} if jax.__version_info__ >= (0, 11) else {}

# Programs that are a second form of another one: nightly.
VARIANTS = {
    "platform_dependent",
    "checkpoint_names",
    "scan_carried_and_scaled",
    "scan_layers_reversed",
    "fori_loop_of_unknown_length",
    "fori_loop_over_layers",
    "custom_vmap_of_weights",
    "vmap_in_vmap",
    "vmap_over_adapters",
    "vmap_of_grad",
    "grad_outside",
    "jvp",
    "pmap_outside",
    "shard_map_of_gathered_weights",
    "shard_map_of_one_axis",
}

# Kinds of weight that differ most in what they ask of a program.
ALWAYS = "scan_stacked"
FEW = {"dense_general_in_axes", "experts", ALWAYS, "tied_embedding", "conv_grouped"}
EIGHT = FEW | {"mlp", "kernel_out_in", "conv_2d"}

# Methods whose networks or maps have a form of their own; every other method has the form of one of them.
FORMS = {"dora", "full", "hadamard_additive", "ia3_in", "lokr", "lora_groups"}

assert {program.name for program in PROGRAMS} >= VARIANTS
assert {kind.name for kind in KINDS} >= EIGHT
assert METHODS.keys() >= FORMS


def case(*values: Any, default: bool) -> Any:
    """A case of the default run, or of the nightly run alone.

    The nightly run checks all cases for leaked tracers, the default run those of the program `bare`: the check doubles
    the time of a case.
    """
    names = [value if isinstance(value, str) else value.name for value in values]
    checked = [pytest.mark.check_leaks] if names[0] == "bare" else []
    return pytest.param(*values, id="-".join(names), marks=checked if default else [pytest.mark.nightly])


def in_default_run(program: Program, kind: Kind) -> bool:
    """Every kind of weight on its own, and one kind in every program.

    Of the others one in four of four kinds and one in 48 of the rest, drawn daily.
    """
    if program.name == "bare" or program.name in VARIANTS:
        return program.name == "bare"
    return kind.name == ALWAYS or drawn(program.name, kind.name, one_in=4 if kind.name in FEW else 48)


PAIRS = [case(program, kind, default=in_default_run(program, kind)) for program in PROGRAMS for kind in KINDS]


@pytest.mark.parametrize(("program", "kind"), PAIRS)
def test_law(program: Program, kind: Kind) -> None:
    """`adapt(f)(params, adapter, x)` is `f(merge(params, adapter), x)`, and so are the derivatives."""
    hold(program, kind, "lora")


def of_methods() -> list[Any]:
    """Every method on every kind of weight, and, for one kind, in every program.

    By default a method of a form of its own takes a few kinds; of all other cases one in 100 is drawn daily.
    """
    bare, mlp = PROGRAMS[0], next(kind for kind in KINDS if kind.name == "mlp")
    return [
        case(name, bare, kind, default=(name in FORMS and kind.name in FEW) or drawn(name, kind.name, one_in=100))
        for name in METHODS
        for kind in KINDS
    ] + [case(name, program, mlp, default=False) for name in METHODS for program in PROGRAMS[1:]]


@pytest.mark.parametrize(("name", "program", "kind"), of_methods())
def test_law_of_methods(name: str, program: Program, kind: Kind) -> None:
    """The law, for every method on every kind of weight, and in every kind of program."""
    hold(program, kind, name)


def of_quantized() -> list[Any]:
    """Some kinds of weight on their own and one in 16 of all cases, drawn daily; nightly every kind, and a few in every
    program.
    """
    return [
        case(
            program,
            kind,
            default=(program.name == "bare" and kind.name in EIGHT)
            or drawn("int8", program.name, kind.name, one_in=16),
        )
        for program in PROGRAMS
        for kind in KINDS
        if program.name == "bare" or kind.name in FEW | {"mlp"}
    ]


@pytest.mark.parametrize(("program", "kind"), of_quantized())
def test_law_of_quantized_weights(program: Program, kind: Kind) -> None:
    """The law on a quantised base, for every kind of weight, and in every kind of program."""
    hold(program, kind, "lora", lambda params: {k: rounded(w) if k in kind.weights else w for k, w in params.items()})


CALLS = itertools.count(1)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Clears JAX's caches now and then: what has been traced for two thousand programs takes a gigabyte."""
    yield
    if next(CALLS) % 50 == 0:
        jax.clear_caches()


def hold(program: Program, kind: Kind, method: str, base: Callable[[Tree], Tree] = lambda params: params) -> None:
    errors = law(program, kind, method, base)
    bounds = BOUNDS | ({"float32": BOUNDS["bfloat16"]} if kind.coarse else {})
    assert {name: error for name, error in errors.items() if not error <= bounds[name.split()[0]]} == {}


def law(program: Program, kind: Kind, method: str, base: Callable[[Tree], Tree]) -> dict[str, float]:
    """How far apart the two sides are, by dtype and part, after checking that no LoRA is formed unasked.

    The parameters are what `base` makes of arrays.
    """
    rng = np.random.default_rng(zlib.crc32(f"{program.name} {kind.name}".encode()))
    fun = program.build(kind.use)
    adapted = jlora.adapt(fun, on_dense="allow" if program.materialised or method != "lora" else "error")

    def merged(params: Tree, adapter: Tree, x: Tree) -> Tree:
        return fun(jlora.merge(params, adapter), x)

    sides = {"adapted": program.around(adapted), "merged": program.around(merged)}
    arrays, x = kind.values(rng, program.copies)
    params = base(arrays)
    if kind.limited and program.demanding:
        return _refused(program, kind, sides, fun, params, x)

    adapter = shapes_of_adapter(kind, fun, params, x, method)
    assert method != "lora" or bool(jlora.explain(fun, params, adapter, x).dense) == program.materialised
    adapter = jax.tree_util.tree_map_with_path(functools.partial(_filled, rng), program.stacked(adapter))
    narrow, positive, near = jax.tree.map(np.abs, (_narrow(arrays), adapter, _narrow(x)))
    cases = {"float32": (params, adapter, x), "bfloat16": (base(narrow), positive, near)}
    if method == "hra":
        # One reflection along positive numbers takes most of a positive weight away. What is rounded then is the
        # base's product and what is taken from it: the unit of this case is the larger of what both programs give,
        # adapted and base. Pairs that nearly cancel, as they start, leave the weight large, and the unit as it is.
        cases[FREE] = cases["bfloat16"]
        cases["bfloat16"] = (base(narrow), jax.tree.map(_near_pairs, positive), near)
    if program.name == "shard_map_of_one_axis" and method.startswith("shared"):
        # The gradient of a factor that all devices share is a sum over one of the two mesh axes. XLA for the CPU aborts
        # on such a sum in 16 bits, in programs without jlora too.
        del cases["bfloat16"]
    sides_of = dict.fromkeys(cases, sides)
    if FREE in cases:
        sides_of[FREE] = sides | {"base": program.around(lambda params, adapter, x: fun(params, x))}
    run = jax.jit(lambda cases: {k: _derivatives(program, sides_of[k], rng, *case) for k, case in cases.items()})
    results = run.lower(cases).compile(compiler_options=OPTIONS)(cases)
    return {
        f"{name} {part}": _error(got["adapted"][part], want, got.get("base", {}).get(part), zero=kind.still)
        for name, got in results.items()
        for part, want in got["merged"].items()
    }


def _filled(rng: np.random.Generator, path: Any, s: jax.ShapeDtypeStruct) -> np.ndarray:
    """Random numbers; of SuperTuning's places the first ones, as digits."""
    values = np.asarray(0.5 * rng.normal(size=s.shape), s.dtype)
    if getattr(path[-1], "key", "") == "place":
        values = np.zeros_like(values)
        values[..., -2], values[..., -1] = np.divmod(np.arange(s.shape[-2]), 256)
    return values


def _near_pairs(u: np.ndarray) -> np.ndarray:
    first, second = u[..., ::2], u[..., 1::2]
    return np.stack([first, first + 0.25 * second], axis=-1).reshape(u.shape).astype(u.dtype)


def _narrow(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == np.float32 else a, tree)


def _derivatives(program: Program, sides: Tree, rng: np.random.Generator, params: Tree, adapter: Tree, x: Tree) -> Tree:
    """Values and derivatives of each side, all in one direction of random numbers."""
    some, back = floats(x)
    out: dict[str, Tree] = {}
    forward = seed = None
    for name, side in sides.items():

        def f(adapter: Tree, some: Tree, side: Any = side) -> Tree:
            return side(params, adapter, back(some))

        if program.forward:
            forward = forward or _direction(rng, (adapter, some))
            value, derivative = jax.jvp(f, (adapter, some), forward)
            out[name] = {"value": value, "derivative": derivative}
        else:
            value, pull = jax.vjp(f, adapter, some)
            seed = _direction(rng, value) if seed is None else seed
            out[name] = dict(zip(("adapter", "x"), pull(seed), strict=True), value=value)
    return out


def _direction(rng: np.random.Generator, tree: Tree) -> Tree:
    return jax.tree.map(lambda a: np.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree)


def _error(got: Tree, want: Tree, beside: Tree, *, zero: bool) -> float:
    """The largest difference in units of the largest entry, `beside` counted; infinite where one side alone is NaN."""
    pairs = [(_double(g), _double(w)) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)]
    if any(g.shape != w.shape or (np.isfinite(g) != np.isfinite(w)).any() for g, w in pairs):
        return np.inf
    scale = max(np.abs(a[np.isfinite(a)]).max(initial=0) for a in map(_double, jax.tree.leaves((want, beside))))
    gap = max(np.abs(g - w)[np.isfinite(w)].max(initial=0) for g, w in pairs)
    assert scale > 0 or zero, "a test that compares nothing with nothing"
    return float(gap / scale) if scale else float(gap)


def _double(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def _refused(program: Program, kind: Kind, sides: Tree, fun: Any, params: Tree, x: Tree) -> dict[str, float]:
    """What JAX has no rule for is refused on both sides."""
    for name, side in sides.items():

        def run(name: str = name, side: Any = side) -> None:
            adapter = program.stacked(shapes_of_adapter(kind, fun, params, x))
            derivatives = functools.partial(_derivatives, program, {name: side}, np.random.default_rng(0))
            jax.eval_shape(derivatives, params, adapter, x)

        with pytest.raises(NotImplementedError):
            run()
    return {}
