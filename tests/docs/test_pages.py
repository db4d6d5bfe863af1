"""Code blocks run, links lead to files and headings, and the files, functions and options that a page names exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import operator
import os
import re
import shlex
from pathlib import Path

import jax
import pytest

import jlora
from tests.support.pages import PAGES, ROOT, anchors, blocks, links, setup_pages, spans


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


def run_blocks(page: Path, folder: Path, marks: tuple[str, ...]) -> None:
    """Runs the Python blocks of a page in one namespace, as a reader would: in JAX's default settings, in a folder."""
    namespace = {"__name__": "page"}
    home = Path.cwd()
    os.chdir(folder)
    try:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for file in (*setup_pages(page), page):
                for block in blocks(file):
                    if block.language == "python" and block.mark in marks:
                        source = "\n" * (block.line - 1) + block.text  # so that a traceback has the file's own lines
                        exec(compile(source, str(file), "exec", dont_inherit=True), namespace)
    finally:
        os.chdir(home)


@every_page
def test_blocks_run(page: Path, tmp_path: Path):
    run_blocks(page, tmp_path, ("",))


@pytest.mark.nightly
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "nightly" for b in blocks(p))], ids=page_name)
def test_long_blocks_run(page: Path, tmp_path: Path):
    run_blocks(page, tmp_path, ("", "nightly"))


if importlib.util.find_spec("keras"):

    def test_keras_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        run_blocks(ROOT / "examples" / "frameworks.md", tmp_path, ("", "keras"))


@every_page
def test_blocks_are_python(page: Path):
    """Those that are only read included."""
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text, f"{page}:{block.line}")


@every_page
def test_commands_name_scripts_and_options(page: Path):
    for block in blocks(page):
        if block.language == "sh":
            for command in re.split(r"&&|\n", block.text.replace("\\\n", " ")):
                words = [word for word in shlex.split(command, comments=True) if "=" not in word.split("/")[0]]
                if words[:1] == ["python"]:
                    script = ROOT / (words[2].replace(".", "/") if words[1] == "-m" else words[1])
                    script = script / "__main__.py" if script.is_dir() else script.with_suffix(".py")
                    text = script.read_text()
                    options = {word for word in words[2:] if word.startswith("--")}
                    assert not {option for option in options if option not in text}, f"{page}: {command}"


@every_page
def test_links_lead_somewhere(page: Path):
    for text, target in links(page):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page}: [{text}]({target})"
        assert not anchor or anchor in anchors(file), f"{page}: [{text}]({target}) names none of {anchors(file)}"


def names_in(file: Path) -> set[str]:
    """The functions, classes, methods and variables that a file defines at its top level."""
    out = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            out.add(node.name)
        elif isinstance(node, ast.ClassDef):
            out |= {node.name, *(f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef))}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            out |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return out


@every_page
def test_linked_functions_exist(page: Path):
    """A link such as [`adapt`](_adapter/adapt.py) names what the file defines."""
    for text, target in links(page):
        if target.endswith(".py") and re.fullmatch(r"`[\w.]+`", text) and not text.endswith(".py`"):
            names = names_in(page.parent / target)
            assert text.strip("`") in names, f"{page}: {target} has no {text}, only {sorted(names)}"


@every_page
def test_named_files_exist(page: Path):
    for span in spans(page):
        if re.fullmatch(r"[\w./]*\w\.py|(\w+/)+", span):
            places = [page.parent / span, ROOT / span, ROOT / "jlora" / span]
            assert any(place.exists() for place in places), f"{page} names `{span}`"


@every_page
def test_public_names_exist(page: Path):
    """Each `jlora.name` is one that a user can reach."""
    text = "\n".join([*spans(page), *(b.text for b in blocks(page) if b.language == "python")])
    for name in set(re.findall(r"\bjlora\.([a-zA-Z]\w*(?:\.[a-zA-Z]\w*)*)", text)):
        if importlib.util.find_spec(f"jlora.{name.split('.')[0]}"):
            importlib.import_module(f"jlora.{name.split('.')[0]}")
        operator.attrgetter(name)(jlora)


def test_every_folder_has_a_page():
    wanted = {
        "README.md",
        *(f"{folder}/README.md" for folder in ("jlora", "jlora/methods", "jlora/io", "jlora/io/peft")),
    }
    assert wanted <= {page_name(page) for page in PAGES}
