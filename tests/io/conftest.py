"""Fixtures of the tests of files."""

from __future__ import annotations

import pytest

from tests.support.peft_files import golden, unpack


@pytest.fixture
def given_files(tmp_path):
    """PEFT's LoRA for BERT in a folder."""
    return unpack(golden()["adapter"]["bert lora"], tmp_path / "given")
