"""Similarity of subspaces and amplification of directions, on matrices whose values are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from benchmarks import subspaces
from benchmarks.subspaces import Run


def basis(seed: int, size: int, count: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, count)))[0]


def test_similarity_is_the_formula() -> None:
    first, second = basis(0, 20, 3), basis(1, 20, 5)
    phi = subspaces.similarity(first, second)
    assert phi.shape == (3, 5)
    for i in (1, 2, 3):
        for j in (1, 2, 3, 4, 5):
            expected = np.linalg.norm(first[:, :i].T @ second[:, :j], "fro") ** 2 / min(i, j)
            assert phi[i - 1, j - 1] == pytest.approx(expected)


def test_similarity_of_equal_and_of_orthogonal_spans() -> None:
    columns = basis(0, 20, 10)
    np.testing.assert_allclose(subspaces.similarity(columns[:, :4], columns), 1.0)
    np.testing.assert_allclose(subspaces.similarity(columns[:, :4], columns[:, 4:]), 0.0, atol=1e-12)
    turned = columns[:, :4] @ basis(2, 4, 4)  # other vectors of the same span
    assert subspaces.similarity(columns[:, :4], turned)[3, 3] == pytest.approx(1.0)
    assert subspaces.similarity(columns[:, :4], turned)[0, 0] < 0.99


def test_similarity_of_random_spans_is_the_larger_count_by_the_width() -> None:
    size, i, j = 200, 8, 32
    phis = [subspaces.similarity(basis(2 * k, size, i), basis(2 * k + 1, size, j)) for k in range(20)]
    assert np.mean(phis, axis=0)[-1, -1] == pytest.approx(j / size, rel=0.05)
    assert np.mean(phis, axis=0)[3, 7] == pytest.approx(8 / size, rel=0.2)


@pytest.mark.parametrize("shape", [(12, 12), (15, 9)])
def test_amplification_of_some_directions_of_the_weight(shape: tuple[int, int]) -> None:
    size, values = min(shape), np.arange(min(shape), 0, -1.0)
    left, right = basis(0, shape[0], size), basis(1, shape[1], size)
    weight, chosen = left * values @ right.T, [3, 5]
    update = 7 * left[:, chosen] * values[chosen] @ right[:, chosen].T
    row = subspaces.amplification(weight, update, 2, np.random.default_rng(0))
    inside = np.hypot(*values[chosen])
    assert row["weight"] == pytest.approx(np.linalg.norm(values))
    assert row["update"] == pytest.approx(7 * inside)
    assert row["in the update's directions"] == pytest.approx(inside)
    assert row["in its own directions"] == pytest.approx(np.hypot(size, size - 1))
    assert row["in random directions"] < row["in its own directions"]
    assert row["factor"] == pytest.approx(7)


KERNELS = ("query", "value")


class Task:
    """Trains nothing: the adapter of a run is a random one."""

    def __init__(self) -> None:
        self.width, self.fitted = 24, []
        rng = np.random.default_rng(0)
        kernels = {name: {"kernel": jnp.asarray(rng.standard_normal((24, 4, 6)), jnp.float32)} for name in KERNELS}
        self.variables = {"params": {"layer_0": {"attention": kernels}}}

    def fit(self, targets: dict[str, jlora.Method], seed: int, *_: Any) -> tuple[jlora.Adapter, Any, Any]:
        def model(variables: Any, x: jax.Array) -> list[jax.Array]:
            kernels = variables["params"]["layer_0"]["attention"]
            return [jnp.einsum("bi,iho->bho", x, kernels[name]["kernel"]) for name in KERNELS]

        self.fitted.append((*targets.values(), seed))
        adapter = jlora.init(jax.random.key(seed), jlora.trace(model, self.variables, jnp.zeros((1, 24))), targets)
        rng = np.random.default_rng(seed)
        factors = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), jnp.float32), adapter)
        return factors, None, SimpleNamespace(losses=[1.0] * 20, seconds=0.0)

    def accuracy(self, head: Any, variables: Any) -> float:
        return 0.5


def test_a_stopped_program_continues_and_compares_the_updates_of_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, runs = Task(), (Run(2, 0), Run(6, 1), Run(6, 2))
    monkeypatch.setattr(subspaces, "make_task", lambda: task)
    adapters = {run: subspaces.trained(run, tmp_path, 3)[0] for run in runs[:2]}
    adapters |= {run: subspaces.trained(run, tmp_path, 3)[0] for run in runs}
    assert [seed for _, seed in task.fitted] == [0, 1, 2]
    with pytest.raises(ValueError, match="is of a run of 3 steps, not 4"):
        subspaces.trained(runs[0], tmp_path, 4)

    path = "params/layer_0/attention/value/kernel"
    pairs = {"one run": (runs[0], runs[0]), "two ranks": runs[:2], "random": (runs[1], None)}
    results = subspaces.compare(task.variables, adapters, pairs)
    assert list(results) == sorted(adapters[runs[0]])
    phis = {pair: np.array(phi) for pair, phi in results[path]["similarity"].items()}
    assert {pair: phi.shape for pair, phi in phis.items()} == {"one run": (2, 2), "two ranks": (2, 6), "random": (6, 6)}
    np.testing.assert_allclose(phis["one run"], 1.0)
    assert 0 < phis["two ranks"][1, 5] < 1

    kernel = subspaces.Kernel(path, task.variables, adapters)
    for run, adapter in adapters.items():
        merged = jlora.merge(task.variables, adapter)["params"]["layer_0"]["attention"]["value"]["kernel"]
        np.testing.assert_allclose(kernel.weight + kernel.update[run], merged.reshape(24, 24), rtol=1e-4, atol=1e-4)
