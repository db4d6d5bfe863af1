"""A typed script of a user's runs, and pyright accepts it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.adapter import typed_script
from tests.support.checkpoints import same


def test_the_typed_script_trains_saves_and_merges(tmp_path: Path) -> None:
    params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 2))}
    x, y = jnp.ones((3, 4)), jnp.zeros((3, 2))
    with jax.numpy_dtype_promotion("standard"):  # Adam raises a Python float to an integer count
        merged, loaded = typed_script.train(params, x, y, str(tmp_path / "adapter"))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert not np.array_equal(merged["up"], params["up"])
    same(sorted(loaded), ["down", "up"])


if importlib.util.find_spec("pyright"):

    @pytest.mark.nightly
    @pytest.mark.parametrize(
        ("line", "errors"), [("", 0), ("wrong: int = jlora.init(jax.random.key(0), sites, jlora.LoRA(rank=2))", 1)]
    )
    def test_pyright_accepts_the_typed_script_and_finds_a_wrong_type_in_it(
        line: str, errors: int, tmp_path: Path
    ) -> None:
        start = "    apply = jlora.adapt(model)\n"
        source = Path(typed_script.__file__).read_text()
        assert start in source
        script = tmp_path / "script.py"
        script.write_text(source.replace(start, f"    {line}\n{start}"))
        command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(script)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert f"{errors} error" in result.stdout, result.stdout
        assert result.returncode == bool(errors)
