"""The script for a real accelerator runs here in its tiny form, with JAX and this checkout alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks._device import FORMS
from benchmarks.methods import METHODS

ROOT = Path(__file__).parents[2]
# What a machine with an accelerator may lack.
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("optax", "orbax", "tensorstore", "safetensors", "flax", "tqdm", "matplotlib"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.nightly
def test_the_script_for_a_device(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    out = tmp_path / "device.json"
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [ROOT / "benchmarks" / "device.sh", "--tiny", "--out", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {base: tuple(rows) for base, rows in result["steps"].items()} == FORMS
    for base, rows in result["steps"].items():
        assert all(len(row["seconds"]) == 1 and row["compiled_bytes"] > 0 for row in rows.values())
        # The plan for one device of the CPU is the compiler's figure, and the CPU counts no peak.
        memory = result["memory"][base]["jlora"]
        assert memory["plan"]["temporaries"] > 0
        assert memory["peak"] is None
    assert result["methods"].keys() == METHODS.keys()
    assert result["bank"].keys() == {"2 adapters", "one adapter, 2 batches"}
    assert not any("error" in row for section in ("bank", "methods") for row in result[section].values())
