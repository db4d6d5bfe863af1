"""Every tensor that a configuration of PEFT promises must be in its file: each one is taken away in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import jlora
from tests.support.peft_files import FILES, golden, program, unpack
from tests.support.peft_models import MODELS

# Copies that PEFT adds to the file or not, of the base and of the trained rows for a tied output head, and what acts in
# training alone.
NOT_PROMISED = (".base_layer.weight", "lm_head.trainable_tokens_delta", ".lora_velora_embed")


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", golden()["adapter"])
def test_a_file_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    model = name.split()[0]
    params, sites, _ = program(model)
    folder = unpack(golden()["adapter"][name], tmp_path / "a")
    tensors = load_file(folder / FILES[1])
    for key in tensors:
        if not key.endswith(NOT_PROMISED):
            save_file({other: array for other, array in tensors.items() if other != key}, folder / FILES[1])
            with pytest.raises(ValueError, match=r"(?i)missing|lacks|no adapter|no tensors|has no|holds no|at once"):
                jlora.peft.load(folder, sites, MODELS[model].names, params=params)
