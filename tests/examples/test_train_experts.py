"""The mixture of experts: both dispatches agree, and an expert moves if and only if it gets tokens."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
import train_experts
from training import mean_loss


@pytest.fixture(autouse=True)
def promotion():
    """Optax promotes dtypes, and the loop broadcasts."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_an_expert_moves_if_and_only_if_it_gets_tokens() -> None:
    """Two steps with outer factors that are shared; the dense dispatch computes the same with the same adapter."""
    job = train_experts.tiny("ragged")
    model = dataclasses.replace(job.model, layers=1)
    params = model.init(jax.random.key(0))
    ids, mask, labels = (array[:8] for array in job.train)
    sites = jlora.trace(model.logits, params, ids, mask, roles=train_experts.ROLES)
    adapter = jlora.init(jax.random.key(1), sites, train_experts.targets_of("shared", rank=2))
    assert {"layers/0/router", "layers/0/experts/up", "layers/0/attention/query"} <= set(adapter)

    run = jlora.adapt(model.logits)
    loss = mean_loss(lambda adapter, params, ids, mask: run(params, adapter, ids, mask))
    gradient = jax.jit(jax.grad(loss))
    for _ in range(2):
        change = gradient(adapter, params, ids, mask, labels)
        adapter = jax.tree.map(lambda a, g: a - 0.5 * g, adapter, change)

    merged = jlora.merge(params, adapter)
    tokens = train_experts.count_tokens(model, params, job.train._replace(ids=ids, mask=mask, labels=labels))
    assert tokens.sum() == model.chosen * mask.sum()
    assert tokens[0, -1] == 0, "the last expert is closed"
    assert tokens[0, :-1].all()
    np.testing.assert_array_equal(train_experts.movement(params, merged) > 1e-6, tokens > 0)

    dense = dataclasses.replace(model, dispatch="dense")
    want = jax.jit(model.logits)(merged, ids, mask)
    np.testing.assert_allclose(jax.jit(jlora.adapt(dense.logits))(params, adapter, ids, mask), want, atol=1e-5)
    for program in (model, dense):
        assert not jlora.explain(program.logits, params, adapter, ids, mask).dense


@pytest.mark.nightly
@pytest.mark.parametrize("dispatch", ["ragged", "dense"])
def test_the_program_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, dispatch: str
) -> None:
    options = ["--tiny", "--steps=12", "--base-steps=4", f"--dispatch={dispatch}", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train_experts.py", *options])
    assert train_experts.main() == 0
    assert "| DoRA | PEFT, target_parameters | refused |" in capsys.readouterr().out
    result = json.loads((tmp_path / "results.json").read_text())
    assert set(result["methods"]) == {"lora", "dora", "shared"}
    for row in result["methods"].values():
        assert row["accuracy"] > result["base"]["accuracy"]
        assert row["moves with its tokens"]
        assert row["dense uses"] == 0
        assert row["loaded"] == 0
        assert max(row["merged"], row["other dispatch"]) < 1e-4
    for method in ("lora", "shared"):
        assert [file["loaded"] for file in result["methods"][method]["files"].values()] == [0, 0, 0]
    each = result["methods"]["dora"]["files"]["PEFT, a module for each expert"]
    assert each["loaded"] < 1e-5
    assert (tmp_path / "experts.png").stat().st_size > 10_000
