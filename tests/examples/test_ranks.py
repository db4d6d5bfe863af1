"""The table of ranks and targets: members of a bank against runs alone, and a program that was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import train_many
from benchmarks import _ranks_report, ranks
from benchmarks.ranks import Run

RUNS = [Run("Wq, Wv", rank, seed) for rank in (1, 3) for seed in (0, 1)]


def job() -> Any:
    """A small random encoder that learns to find one bit of its tokens."""
    tiny = train_many.tiny()
    return train_many.Job(tiny.params, tiny.embed, *({"texts": part["tweets"]} for part in (tiny.train, tiny.test)))


@pytest.mark.nightly
def test_a_member_equals_the_run_alone() -> None:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        tiny = job()
        rows = ranks.train_bank(tiny, RUNS, steps=8)
        compared = ranks.compare(tiny, RUNS[2], rows[2], steps=8)
    assert [row["parameters"] for row in rows] == [64, 64, 192, 192]
    assert compared["difference of logits"] < 1e-5
    assert compared["accuracy"] == compared["in the bank"]
    assert rows[0]["loss"] != rows[1]["loss"] != rows[2]["loss"], "ranks and seeds are runs of their own"


def test_a_program_that_was_stopped_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    banks, out = [], tmp_path / "ranks.json"

    def train_bank(job: Any, runs: list[Run], steps: int) -> list[dict[str, Any]]:
        if len(banks) == 1:
            banks.append("stopped")
            raise KeyboardInterrupt
        banks.append(runs)
        accuracy = {"accuracy": 0.5, "parameters": 10 * runs[0].rank, "logits": None}
        return [vars(run) | accuracy for run in runs]

    monkeypatch.setattr(ranks, "train_bank", train_bank)
    monkeypatch.setattr(ranks, "compare", lambda job, run, row, steps: vars(run))
    runs = [Run(targets, rank, 0) for targets in ("Wq", "Wk") for rank in (1, 2)]

    def result() -> dict[str, Any]:
        return json.loads(out.read_text()) if out.exists() else {"settings": {"steps": 4}, "runs": []}

    with pytest.raises(KeyboardInterrupt):
        ranks.train_missing(lambda: None, runs, result(), out)
    assert [row["targets"] for row in result()["runs"]] == ["Wq", "Wq"]
    ranks.train_missing(lambda: None, runs, result(), out)
    assert banks == [runs[:2], "stopped", runs[2:]]
    assert [Run(row["targets"], row["rank"], row["seed"]) for row in result()["runs"]] == runs
    assert result()["alone"] == vars(runs[1])

    monkeypatch.setattr(_ranks_report, "RESULT", out)
    assert _ranks_report.table().splitlines()[2:] == [
        "| Wq | 10 | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) |",
        "| Wk | 10 | 50.0 (50.0 to 50.0) | 50.0 (50.0 to 50.0) |",
    ]
