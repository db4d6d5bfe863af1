"""Figures on pages are those of the result files, and tables of figures are generated."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import _measure, pages
from benchmarks._sentences import SENTENCES, Sentence, with_sentence
from tests.support.pages import PAGES, ROOT

END = pages.END
# Tables of the benchmarks' pages that state no results: commands with the time that they take.
COMMANDS = "| what | command |"


@pytest.mark.parametrize("name", pages.TABLES)
def test_generated_tables_are_those_of_the_results(name: str):
    page, make = pages.TABLES[name]
    text = page.read_text()
    assert pages.with_table(text, name, make()) == text, "run python -m benchmarks.pages"


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.text[:40])
def test_sentences_have_the_figures_of_the_results(sentence: Sentence):
    text = (ROOT / sentence.page).read_text()
    assert with_sentence(text, sentence) == text, "run python -m benchmarks.pages"


def test_figures_that_differ_are_replaced():
    sentence = Sentence("page.md", "takes {} ms, and {} of it. End {}.", lambda: ("1.5", "20%", "4e-6"))
    assert with_sentence("It takes 2,000.25 ms, and 3% of it. End 5.", sentence).endswith(
        "1.5 ms, and 20% of it. End 4e-6."
    )
    for text in ("It takes no time.", "It takes 1 ms, and 2 of it. End 3.4x.", 2 * "takes 1 ms, and 2 of it. End 3."):
        with pytest.raises(ValueError, match="not once"):
            with_sentence(text, sentence)


def test_every_generated_table_has_a_program():
    marked = {name for page in PAGES for name in re.findall(r"<!-- table: (.+) -->", page.read_text())}
    assert marked == set(pages.TABLES)


@pytest.mark.parametrize("page", sorted((ROOT / "benchmarks").glob("*.md")), ids=lambda page: page.name)
def test_every_table_of_figures_is_generated(page: Path):
    text = re.sub(rf"<!-- table: .+? -->.+?{END}", "", page.read_text(), flags=re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    by_hand = [table for table in tables if not table.startswith(COMMANDS) and re.search(r"\d\.\d", table)]
    assert by_hand == []


def test_plans_keep_their_limits():
    """Each bar of the plans passes, and so does each that a result file records."""
    results = json.loads((_measure.RESULTS / "plan.json").read_text())
    assert [bar.name for bar in pages._plan_report.bars(results) if not bar.passed] == []
