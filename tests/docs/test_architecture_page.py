"""The page about the architecture has the packages and the order that the import test enforces."""

import re

from tests.support.pages import ROOT
from tests.test_imports import ONLY, PACKAGES

PAGE = (ROOT / "jlora" / "README.md").read_text()
PICTURE = PAGE.split("```mermaid\n")[1].split("```")[0]
INSIDE = {package for package in PACKAGES if package}


def packages_of_nodes() -> dict[str, set[str]]:
    """The packages that each node of the picture stands for: the names before its line break."""
    nodes = re.findall(r'(\w+)\["(.*?)(?:<br>.*?)?"\]', PICTURE)
    return {node: set(names.split(", ")) for node, names in nodes}


def test_the_picture_has_every_package():
    shown = set().union(*packages_of_nodes().values())
    assert shown == INSIDE, f"not in the picture: {INSIDE - shown}; no such packages: {shown - INSIDE}"


def test_arrows_run_to_earlier_packages():
    nodes = packages_of_nodes()
    edges = re.findall(r"^  (\w+)(?:\[.*?\])? --> (\w+)", PICTURE, flags=re.MULTILINE)
    assert edges
    for start, end in edges:
        for package in nodes[start]:
            allowed = ONLY.get(package, set(PACKAGES[: PACKAGES.index(package)]))
            assert nodes[end] <= allowed, f"{package} does not import {nodes[end]}"


def test_the_table_has_every_package():
    table = PAGE.split("\n## Packages\n")[1].split("\n## ")[0]
    names = re.findall(r"^\| `([\w./]+)` \|", table, flags=re.MULTILINE)
    rows = {name.removesuffix(".py").strip("/") for name in names}
    assert rows == INSIDE
