"""The table of failures that may not be silent: every line names tests of the default run that exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.pages import ROOT

PAGE = ROOT / "tests" / "README.md"
TABLE = PAGE.read_text().split("\n## Never silently wrong\n")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| (.+?) \| (.+) \|$", TABLE, re.MULTILINE)[2:]


@pytest.mark.parametrize(("failure", "tests"), ROWS, ids=[failure for failure, _ in ROWS])
def test_every_failure_has_tests_of_the_default_run(failure: str, tests: str) -> None:
    named = re.findall(r"\[`(test_\w+)`\]\(([\w/]+\.py)\)", tests)
    assert named, failure
    for name, file in named:
        tree = ast.parse((PAGE.parent / file).read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert functions, f"{file} has no {name}"
        marks = {ast.unparse(decorator) for node in functions for decorator in node.decorator_list}
        assert "pytest.mark.nightly" not in marks, f"{name} runs at night alone"


def test_the_table_is_read() -> None:
    assert len(ROWS) > 20
