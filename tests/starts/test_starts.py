"""EVA, CorDA and LoRA-GA against NumPy: stacks, quantised bases, embeddings, and errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.compiled import memory
from tests.support.data_starts import products_with
from tests.support.int8_rows import rounded
from tests.support.quantized import weight
from tests.support.references import error

Tree = Any
Shape = tuple[int, ...]

RNG = np.random.default_rng(5)


def update(shape: Shape, method: jlora.Method, roles: tuple[Any, ...]) -> jlora.Update:
    """A new update of a weight that no program has, its factors as shapes."""
    site = jlora.Site("w", shape, jnp.dtype(jnp.float32), None, (), roles)
    arrays = jax.eval_shape(lambda key: method.init(key, site, jnp.float32, None), jax.random.key(0))
    shapes = method.shapes(jlora.Update({}, method, roles, shape).axes)
    factors = {name: jax.ShapeDtypeStruct(shapes[name], a.dtype) for name, a in arrays.items()}
    frozen = {name: factors.pop(name) for name in method.frozen}
    return jlora.Update(factors, method, roles, shape, frozen)


def sums(rows: np.ndarray) -> jlora.Inputs:
    """Of rows `(*stack, rows, in)`."""
    count = np.full(rows.shape[:-2], rows.shape[-2])
    return jlora.Inputs(rows.swapaxes(-1, -2) @ rows, rows.sum(-2), count)


def spread(*scales: float, mean: float = 2.0, rows: int = 50) -> np.ndarray:
    """Rows along random orthogonal directions with these deviations, and a mean."""
    n = len(scales)
    rotation = np.linalg.qr(RNG.normal(size=(n, n)))[0]
    return RNG.normal(size=(rows, n)) * scales @ rotation + mean


def components(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components as columns, and their shares of the variance."""
    _, s, vt = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    return vt.T, s**2 / (s**2).sum()


def same_columns(a: Any, b: Any, bound: float = 1e-5) -> bool:
    """Whether columns are equal up to their signs."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return error(a * np.sign((a * b).sum(0)), b) <= bound


def test_eva_gives_ranks_to_the_layers_of_a_stack_and_keeps_scales() -> None:
    steep, flat, even = spread(9, 1, 1, 1, 1, 1), spread(5, 5, 5, 0, 0, 0), spread(1, 1, 1, 1, 1, 1)
    method = jlora.LoRA(2, alpha=6.0, rank_stabilized=True, freeze_a=True)
    adapter = {
        "stack": update((2, 6, 9), method, ("stack", "in", "out")),
        "even": update((9, 6), jlora.DoRA(2, alpha=3.0), ("out", "in")),
    }
    shares = {"a": components(steep)[1], "b": components(flat)[1], "c": components(even)[1]}
    best = sorted(((s, name) for name, part in shares.items() for s in part[:4]), reverse=True)[:6]
    ranks = [sum(name == layer for _, name in best) for layer in "abc"]
    assert ranks == [1, 3, 2]
    started = jlora.eva(adapter, {"stack": sums(np.stack([steep, flat])), "even": sums(even)}, rho=2)
    stack, row = started["stack"], started["even"]
    a = np.asarray(stack.frozen["a"])
    assert a.shape == (2, 6, 3)
    assert stack.factors["b"].shape == (2, 3, 9)
    assert not stack.factors["b"].any()
    assert not a[0, :, 1:].any()
    assert same_columns(a[0, :, :1], components(steep)[0][:, :1])
    assert same_columns(a[1], components(flat)[0][:, :3])
    assert row.factors["a"].shape == (6, 2)
    assert [u.method.scale for u in (stack, row)] == [pytest.approx(u.method.scale) for u in adapter.values()]


def test_eva_without_redistribution_and_a_weight_that_gets_no_rank() -> None:
    steep, flat = spread(9, 9, 0.1, 0.1, rows=400), spread(1, 1, 1, 1, rows=400)
    adapter = {name: update((4, 4), jlora.LoRA(1), ("in", "out")) for name in ("steep", "flat")}
    inputs = {"steep": sums(steep), "flat": sums(flat)}
    assert jlora.eva(adapter, inputs).keys() == {"steep"}
    kept = jlora.eva(adapter, inputs, rho=1)
    assert {name: u.method for name, u in kept.items()} == {name: u.method for name, u in adapter.items()}
    assert same_columns(kept["flat"].factors["a"], components(flat)[0][:, :1])


def test_eva_of_an_embedding_takes_the_ids_that_occur_most_often() -> None:
    counts = np.array([3.0, 0, 7, 1, 9])
    adapter = {"embed": update((5, 4), jlora.LoRA(2), ("in", "out"))}
    started = jlora.eva(adapter, {"embed": jlora.Inputs(None, counts, 20.0)}, rho=1)
    assert np.array_equal(started["embed"].factors["a"], np.eye(5, dtype=np.float32)[:, [4, 2]])


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_corda_of_a_stack_an_out_in_weight_and_an_embedding(mode: Any) -> None:
    """A B s = U U^T W in the space of the outputs, with U the singular vectors of the whole product."""
    method = jlora.LoRA(2, alpha=-3.0)
    adapter = {
        "stack": update((6, 2, 9), method, ("in", "stack", "out")),
        "back": update((8, 5), method, ("out", "in")),
        "embed": update((7, 4), method, ("in", "out")),
    }
    params = {name: weight(*u.shape) for name, u in adapter.items()}
    rows = np.stack([spread(3, 2, 1, 1, 0.5, 0.1), spread(1, 1, 1, 1, 1, 4)])
    back, counts = spread(2, 2, 1, 1, 1), np.arange(7.0)
    inputs = {"stack": sums(rows), "back": sums(back), "embed": jlora.Inputs(None, counts, counts.sum())}
    started = jlora.corda(adapter, inputs, params, mode=mode)
    matrices = {
        "stack": [(rows[k].T @ rows[k], params["stack"][:, k]) for k in range(2)],
        "back": [(back.T @ back, params["back"].T)],
        "embed": [(np.diag(counts), params["embed"])],
    }
    for name, layers in matrices.items():
        new, cut = started[name], slice(0, 2) if mode == "instruction" else slice(-2, None)
        a, b = (np.asarray(new.joined(x)).reshape(len(layers), *new.joined(x).shape[-2:]) for x in "ab")
        for k, (c, w) in enumerate(layers):
            c = c / np.diag(c).mean() + 0.01 * np.eye(len(c))
            out = np.linalg.svd(c @ w)[2][: min(w.shape)][cut]
            assert error(new.method.scale * a[k] @ b[k], w @ out.T @ out) < 1e-5
        assert new.method.offset
        assert all(np.array_equal(new.initial[x], new.factors[x]) for x in "ab")


def test_lora_ga_of_a_stack_and_a_convolution_is_near_the_best_low_rank_gradient() -> None:
    """A has the first singular vectors, B the next ones; from a flat spectrum too the error is near the best one."""
    method, n = jlora.LoRA(8, alpha=16.0), (96, 64)
    adapter = {
        "stack": update((2, *n), method, ("stack", "in", "out")),
        "conv": update((4, 8, 3, 96), method, ("out", "out", "window", "in")),
    }
    decay = 0.8 ** np.arange(64)
    left, right = (np.linalg.qr(RNG.normal(size=(2, size, 64)))[0] for size in n)
    stack = np.stack([left[0] * decay @ right[0].T, RNG.normal(size=n)])
    conv = RNG.normal(size=(288, 32))
    started = jlora.lora_ga(jax.random.key(0), adapter, products_with({"stack": stack, "conv": conv}))
    a, b = (np.asarray(started["stack"].factors[name]) for name in "ab")
    u, _, vt = np.linalg.svd(stack[0])
    assert same_columns(4 / n[1] ** 0.25 * a[0], u[:, :8], 1e-3)
    assert same_columns(4 / n[1] ** 0.25 * b[0].T, vt[8:16].T, 1e-3)
    for g, q in ((stack[0], a[0]), (stack[1], a[1]), (conv, np.asarray(started["conv"].joined("a")))):
        q = np.linalg.qr(q)[0]
        s = np.linalg.svd(g, compute_uv=False)
        assert np.linalg.norm(g - q @ (q.T @ g)) <= 1.02 * np.linalg.norm(s[8:])


def test_the_gradient_of_a_probe_has_no_array_of_the_weights_size() -> None:
    """The gradient of 512 x 768 has 1.6 MB; all temporaries and outputs here take less than a third."""
    shape, x = (512, 768), jax.ShapeDtypeStruct((32, 512), jnp.float32)
    adapter = {"w": update(shape, jlora.LoRA(8), ("in", "out"))}
    seen: list[Tree] = []

    def loss(adapter: Tree, params: Tree, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(jlora.adapt(lambda p, x: x @ p["w"])(params, adapter, x)))

    def gradient(probe: Tree) -> Tree:
        seen.append(jax.eval_shape(lambda: probe))
        return products_with({"w": np.ones(shape)})(probe)

    jlora.lora_ga(jax.random.key(0), adapter, gradient, passes=2)
    assert seen[0] == seen[1], "one compiled program for all passes"
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    used = memory(jax.jit(jax.grad(loss)).lower(seen[0], params, x).compile())
    assert used.temp_size_in_bytes + used.output_size_in_bytes < 4 * shape[0] * shape[1] / 3


def test_corda_of_a_quantised_stack_decomposes_what_it_stands_for() -> None:
    adapter = {"layers/up": update((3, 8, 12), jlora.LoRA(2), ("stack", "in", "out"))}
    inputs, params = {"layers/up": sums(RNG.normal(size=(3, 20, 8)))}, {"layers/up": rounded(weight(3, 8, 12))}
    low, plain = (
        jlora.corda(adapter, inputs, p, mode="knowledge")["layers/up"] for p in (params, jlora.dequantize(params))
    )
    products = [np.asarray(u.factors["a"]) @ np.asarray(u.factors["b"]) for u in (low, plain)]
    assert error(*products) < 1e-5


def test_a_start_leads_down_faster_than_random_factors() -> None:
    """LoRA-GA and LoRA at one learning rate, towards other weights; the gradient is that of a square, by NumPy."""
    base, target = (np.random.default_rng(k).normal(size=(24, 16)) for k in (0, 1))
    x = np.random.default_rng(2).normal(size=(200, 24))
    gap, rate = (base - target) / 10, 1e-2

    def of_weight(change: np.ndarray) -> np.ndarray:
        return x.T @ x @ (gap + change) / len(x)

    def losses(a: np.ndarray, b: np.ndarray) -> list[float]:
        start, out = a @ b, []
        for _ in range(40):
            g = of_weight(a @ b - start)
            a, b = a - rate * g @ b.T, b - rate * a.T @ g
            out.append(float(np.square(x @ (gap + a @ b - start)).mean()))
        return out

    adapter = {"w": update((24, 16), jlora.LoRA(4), ("in", "out"))}
    new = jlora.lora_ga(jax.random.key(0), adapter, products_with({"w": of_weight(np.zeros_like(base))}), gamma=1.0)
    plain = np.random.default_rng(3).uniform(-1, 1, size=(24, 4)) / 24**0.5
    ours = losses(*(np.asarray(new["w"].factors[name], np.float64) for name in "ab"))
    others = losses(plain, np.zeros((4, 16)))
    assert all(one < other for one, other in zip(ours, others, strict=True))


def refusals() -> dict[str, tuple[Callable[[], Any], str]]:
    lora = {"w": update((6, 4), jlora.LoRA(2), ("in", "out"))}
    vera = {"w": update((6, 4), jlora.IA3(), ("in", "out"))}
    dora = {"w": update((6, 4), jlora.DoRA(2), ("in", "out"))}
    wide = {"w": update((6, 4), jlora.LoRA(3), ("in", "out"))}
    masked = {"w": dataclasses.replace(lora["w"], rank_mask=jnp.ones(2))}
    rows = spread(1, 1, 1, 1, 1, 1)
    inputs, params = {"w": sums(rows)}, {"w": weight(6, 4)}
    gradient = products_with({"w": weight(6, 4)})
    key, bad = jax.random.key(0), np.full((6, 4), np.nan)
    return {
        "eva of another method": (lambda: jlora.eva(vera, inputs), "w: EVA initialises LoRA or DoRA, not IA3"),
        "corda of DoRA": (lambda: jlora.corda(dora, inputs, params, mode="knowledge"), "CorDA initialises LoRA, not"),
        "ga of DoRA": (lambda: jlora.lora_ga(key, dora, gradient), "LoRA-GA initialises LoRA, not DoRA"),
        "ga of a high rank": (lambda: jlora.lora_ga(key, wide, gradient), "takes 6 singular vectors .* Lower the rank"),
        "ga, passes": (lambda: jlora.lora_ga(key, lora, gradient, passes=3), "an even number of passes"),
        "ga, gamma": (lambda: jlora.lora_ga(key, lora, gradient, gamma=0), "gamma is a positive number"),
        "ga, not finite": (lambda: jlora.lora_ga(key, lora, products_with({"w": bad})), "w: its gradient has entries"),
        "eva, rho": (lambda: jlora.eva(lora, inputs, rho=0.5), "rho is a number from 1 on"),
        "corda, mode": (lambda: jlora.corda(lora, inputs, params, mode="ipm"), "'instruction' or 'knowledge'"),  # pyright: ignore[reportArgumentType]
        "corda, damping": (lambda: jlora.corda(lora, inputs, params, mode="knowledge", damping=0), "positive number"),
        "no inputs": (lambda: jlora.eva(lora, {"v": inputs["w"]}), "w: its inputs were not recorded .*near misses: v"),
        "other inputs": (lambda: jlora.eva(lora, {"w": sums(rows[:, :3])}), r"shape \(3,\), the weight has \(6,\)"),
        "not finite": (lambda: jlora.eva(lora, {"w": sums(rows * np.nan)}), "w: its inputs have entries"),
        "a weight of zeros": (
            lambda: jlora.corda(lora, inputs, {"w": np.zeros((6, 4))}, mode="knowledge"),
            "w: a singular value that CorDA selects is zero",
        ),
        "a mask of ranks": (lambda: jlora.eva(masked, inputs), "as jlora.init returns it"),
        "other parameters": (lambda: jlora.corda(lora, inputs, {"v": 1}, mode="knowledge"), "no such parameter"),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cannot_start_is_refused(name: str) -> None:
    start, message = refusals()[name]
    with pytest.raises(ValueError, match=message):
        start()
