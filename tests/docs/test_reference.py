"""Every public name has a docstring that names its arguments, and a place in the generated reference and in `help`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import pydoc
import re
from types import ModuleType
from typing import Any

import pdoc
import pytest

import jlora

# A name of `jlora` that is a module has a page of its own.
MODULES: list[ModuleType] = [jlora, *(m for name in jlora.__all__ if inspect.ismodule(m := getattr(jlora, name)))]


def names_of(module: ModuleType) -> list[str]:
    """The public names of a module, modules excepted."""
    return [name for name in module.__all__ if not inspect.ismodule(getattr(module, name))]


NAMES = [(module, name) for module in MODULES for name in names_of(module)]
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
every_name = pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.__name__}.{name}" for m, name in NAMES])


@every_module
def test_public_names_are_listed_once_and_exist(module: ModuleType):
    assert len(set(module.__all__)) == len(module.__all__)
    assert not {name for name in module.__all__ if not hasattr(module, name)}
    assert set(module.__all__) <= set(dir(module))


def arguments(value: Any) -> set[str]:
    """The parameters of a function, or the fields of a dataclass."""
    if dataclasses.is_dataclass(value):
        return {field.name for field in dataclasses.fields(value)}
    return set(inspect.signature(value).parameters) if inspect.isfunction(value) else set()


@every_name
def test_docstring(module: ModuleType, name: str):
    """One sentence first, and a word about every argument. Names for types and for foreign values need none."""
    value = getattr(module, name)
    if not inspect.isclass(value) and not (inspect.isfunction(value) and value.__module__.startswith("jlora")):
        return
    doc = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{value.__name__}("), f"{name} has the docstring that dataclasses write"
    assert re.match(r"[^\n]+[.:]$", doc, flags=re.MULTILINE), f"{name}: the first line is not one sentence"
    missing = {argument for argument in arguments(value) if not re.search(rf"\b{argument}\b", doc)}
    if inspect.isclass(value):
        for base in value.__mro__[1:]:
            missing -= arguments(base)
    assert not missing, f"{name} does not say what {missing} are"


@every_module
def test_the_reference_has_every_name(module: ModuleType):
    page = pdoc.render.html_module(pdoc.doc.Module(module), {})  # pyright: ignore[reportPrivateImportUsage]
    shown = set(re.findall(r'<section id="(\w+)">', page))
    assert set(names_of(module)) <= shown, f"not in the reference: {set(names_of(module)) - shown}"


def test_the_reference_has_a_page_for_every_public_module_and_no_private_one():
    written = set(pdoc.extract.walk_specs(["jlora"]))  # pyright: ignore[reportPrivateImportUsage]
    assert {module.__name__ for module in MODULES} <= written
    assert not {name for name in written if re.search(r"\._", name)}


def test_help_shows_every_name():
    text = pydoc.plain(pydoc.render_doc(jlora))
    assert not {name for name in jlora.__all__ if not re.search(rf"\b{name}\b", text)}


def test_version():
    assert jlora.__version__ == importlib.metadata.version("jlora")
