"""Adapters for several genres: trained together as by themselves, and served in mixed batches."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jlora
import train_many

TINY = ["--tiny", "--alone", "--batch=16", "--rank=4"]


def test_together_alone_and_mixed_are_equal(tmp_path: Path) -> None:
    """Two genres with learning rates of their own, one seed; the bank that is evaluated was saved and loaded."""
    job = train_many.tiny()
    chosen = ("film reviews", "product reviews")
    job = dataclasses.replace(job, **{part: {g: getattr(job, part)[g] for g in chosen} for part in ("train", "test")})
    options = train_many.arguments([*TINY, "--steps=24", f"--out={tmp_path}"])
    options.lr = [0.03, 0.02]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = train_many.run(job, options, seed=0)
    for ways in result["genres"].values():
        assert set(ways) == {"together", "alone", "mixed batch"}
        assert ways["together"]["accuracy"] > 0.8
        for way in ways.values():
            assert way["accuracy"] == ways["together"]["accuracy"]
            assert way["difference of logits"] < 1e-3
    pairs = np.array(result["pairs"])
    assert pairs.shape == (2, 2)
    assert pairs.diagonal().min() > max(pairs[0, 1], pairs[1, 0]), "each adapter is best on its genre"
    assert list(jlora.bank.load(tmp_path / "bank-0")) == list(chosen)


@pytest.mark.nightly
def test_the_program_writes_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_many.py", *TINY, "--steps=4", "--seeds", "0", "1", "--out", str(tmp_path)])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert train_many.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| genre | frozen encoder | alone | together | mixed batch |"
    assert [row.split("|")[1].strip() for row in rows[2:]] == [*train_many.FILES, "mean"]
    assert (tmp_path / "many.png").stat().st_size > 10_000
