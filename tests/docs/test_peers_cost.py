"""The costs of a step: a figure that grows fails, the libraries do the same work, the picture is of the results."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import peers
from benchmarks._peers import quick, report

COSTS = json.loads(quick.RESULT.read_text())["programs"]
OURS = [name for name in COSTS if name.startswith("jlora")]
ROWS = report.results()


@pytest.mark.parametrize("figure", COSTS[OURS[-1]])
def test_a_figure_that_grows_fails(figure: str, monkeypatch: pytest.MonkeyPatch):
    grown = copy.deepcopy(COSTS)
    grown[OURS[-1]][figure] *= 1.02
    assert [bar.name for bar in quick.growth(grown, COSTS) if not bar.passed] == [f"{OURS[-1]}: {figure}"]
    monkeypatch.setattr(quick, "environment", lambda: json.loads(quick.RESULT.read_text())["environment"])
    monkeypatch.setattr(quick, "programs", lambda: grown)
    assert quick.main(write=False) == 1


def test_the_committed_figures_pass(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quick, "programs", lambda: COSTS)
    assert quick.main(write=False) == 0
    assert all(bar.passed for bar in quick.growth(COSTS, COSTS))


def test_figures_of_other_programs_are_not_compared():
    with pytest.raises(ValueError, match="--quick --write"):
        quick.growth(COSTS, {name: row for name, row in COSTS.items() if name != OURS[0]})


def test_more_than_by_hand_fails_on_any_release_of_jax(monkeypatch: pytest.MonkeyPatch):
    grown = copy.deepcopy(COSTS)
    grown[OURS[0]]["flops"] *= 1.02
    monkeypatch.setattr(quick, "environment", lambda: {"jax": "another", "machine": ""})
    monkeypatch.setattr(quick, "programs", lambda: grown)
    assert quick.main(write=False) == 1


@pytest.mark.parametrize("size", ROWS)
def test_every_library_has_a_row_or_a_reason(size: str):
    row = ROWS[size]
    assert row["sizes"] == peers.SIZES[size]
    assert {*row["libraries"], *row["left_out"]} == {*(peer.name for peer in peers.COMPARED), "lorax"}
    report.check_same_work(row["libraries"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_loss": 7.0}, "weights alone"),
        ({"loss": 7.0}, "W \\+ s A B"),
        ({"trained": 1}, "trains 1"),
        ({"reference_loss": ROWS["default"]["libraries"]["qwix"]["base_loss"]}, "idle"),
    ],
)
def test_other_work_is_refused(change: dict[str, float], words: str):
    rows = ROWS["default"]["libraries"]
    with pytest.raises(ValueError, match=words):
        report.check_same_work(rows | {"qwix": rows["qwix"] | change})


def test_the_picture_is_of_the_results():
    picture = report.RESULT.with_suffix(".png").read_bytes()
    assert report.digest(report.RESULT).encode() in picture, "run python -m benchmarks.pages"
