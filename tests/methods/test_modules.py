"""The module of a method is imported when its name is first used: in a program, or in a file that is loaded."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora
import jlora.methods


def test_the_table_of_methods_has_every_method_of_every_file():
    files = sorted(Path(jlora.methods.__file__ or "").parent.glob("[!_]*.py"))
    modules = [importlib.import_module(f"jlora.methods.{file.stem}") for file in files]
    assert len(modules) > 40
    defined = {
        name: module.__name__
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, jlora.Method) and value.__module__ == module.__name__
    }
    assert defined == jlora.methods._MODULES
    assert set(modules) == {sys.modules[name] for name in defined.values()}


PROGRAM = """
import dataclasses, sys
import jlora, jlora.methods

folder = sys.argv[1]

def loaded():
    return sorted(module for module in jlora.methods._MODULES.values() if module in sys.modules)

def lower(self, update, w):
    return w

def refused(name, module):
    try:
        type(name, (jlora.Method,), {"__module__": module, "lower": lambda self, update, w: w})
    except TypeError as error:
        return str(error)

class DoRA(jlora.Method):  # named as one of jlora's that is not imported
    lower = lower

assert loaded() == [], loaded()
adapter = jlora.load(folder)
assert loaded() == ["jlora.methods.dora", "jlora.methods.lora"], loaded()
assert adapter["w"].method == jlora.DoRA(2), adapter
assert jlora.DoRA is not DoRA

mine = {"w": dataclasses.replace(adapter["w"], method=DoRA())}
jlora.save(folder + "_mine", mine)
assert type(jlora.load(folder + "_mine")["w"].method) is DoRA
assert type(jlora.load(folder)["w"].method) is jlora.DoRA

class LoRA(jlora.Method):  # named as one that is imported
    lower = lower

jlora.save(folder + "_mine_2", {"w": dataclasses.replace(adapter["w"], method=LoRA())})
assert type(jlora.load(folder + "_mine_2")["w"].method) is LoRA
assert type(jlora.load(folder)["w"].method) is jlora.DoRA

# A class that would be saved under a name of jlora's is refused when it is made, whatever is imported.
for name in ("LoRA", "HiRA"):
    assert "two methods named " + name in str(refused(name, "jlora.methods.of_a_user"))
assert "two methods named __main__.LoRA" in str(refused("LoRA", "__main__"))
assert jlora.HiRA.__module__ == "jlora.methods.hira"
"""


def test_names_of_methods_mean_the_same_in_every_order_of_imports(tmp_path: Path):
    params, x = {"w": jnp.ones((4, 6))}, jnp.ones((2, 4))
    sites = jlora.trace(lambda p, x: x @ p["w"], params, x)
    jlora.save(tmp_path / "adapter", jlora.init(jax.random.key(0), sites, jlora.DoRA(2), params=params))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "adapter")], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
