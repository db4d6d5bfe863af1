"""`jlora.info` of every type of PEFT: the numbers that train in each module, and what it refuses."""

from __future__ import annotations

import pytest

import jlora
from tests.io import test_peft_maps as maps
from tests.io.test_peft_types import GOLDEN, unpack
from tests.support.peft_files import change_configuration

# By recorded file the numbers that train in layers.0, layers.1 and out, from the formulas of the methods. Arrays that
# modules share, biases of a module and arrays that are not trained do not count.
NUMBERS = {
    "tinylora": [0, 0, 0],
    "vblora": [2 * (2 + 2) * 5, 2 * (2 + 2) * 5, 2 * (2 + 3) * 5],  # logits of 5 vectors, of 4 numbers each
    "unilora": [0, 0, 0],
    "pvera": [2 * 3 + 8, 2 * 3 + 8, 2 * 3 + 12],
    "monteclora": None,
    "super_tuning": [12, 12, 19],  # a fifth of 64 and of 96
    "frod": [8 + 6, 8 + 6, 8 + 6],
    "gralora": [64, 64, 80],
    "bd_lora": [4 * 8 + 8 * 2, 4 * 8 + 8 * 2, 4 * 4 + 4 * 12],
    "kasa": [34, 34, 42],
    "osf": [3 * 17, 3 * 17, 3 * 21],
    "c3a": [16, 16, 48],
    "fourierft": [11, 11, 30],
    "waveft": [19, 19, 19],
    "shira": [16, 16, 20],
    "randlora": [9 + 24, 9 + 24, 9 + 24],
    "hira": [32, 32, 40],
    "delora": [33, 33, 61],
    "miss": [32, 32, 48],
    "miss_of_another_size": [24, 24, 36],
    "glora": [64, 64, 80],
    "hra_biases": [16, 16, 16],
    "all_biases": [32, 32],
}


def test_numbers_of_every_type(tmp_path):
    for name, numbers in NUMBERS.items():
        unpack("adapter", name, tmp_path / name)
        report = jlora.info(tmp_path / name)
        assert not report.refused, name
        (summary,) = report.adapters.values()
        rows = {update.path: update.numbers for update in summary.updates if not isinstance(update.method, jlora.Full)}
        assert sorted(rows) == ["layers.0", "layers.1", "out"][: len(rows)], name
        if numbers is not None:
            assert [rows[path] for path in sorted(rows)] == numbers, name
    for name in maps.OPTIONS:
        folder = maps.write(tmp_path / f"maps_{name}", maps.config_of(name), maps.tensors_of(name))
        report = jlora.info(folder)
        assert not report.refused, name
        assert [update.path for summary in report.adapters.values() for update in summary.updates] == ["0"], name
    assert len(GOLDEN["adapter"]) > len(NUMBERS) > 20


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hira", {"r": 3}, "layers.0: the rank of its tensors is 2, and r or rank_pattern in .* gives 3"),
        ("osf", {"effective_rank": 6}, "layers.0: the number of singular values that are not trained .* 5"),
        ("tinylora", {"weight_tying": 0.0}, "weight_tying = 0.0 gives its 3 modules 3"),
        ("miss", {"init_weights": "bat"}, "'bat' multiplies blocks"),
    ],
)
def test_what_no_program_could_load_is_listed(name, fields, message, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    change_configuration(tmp_path / "a", **fields)
    with pytest.raises(ValueError, match=message):
        raise ValueError(*jlora.info(tmp_path / "a").refused[:1])


def test_a_folder_without_the_tensors_states_what_it_has(tmp_path):
    """A pickle, shards, and adapters of other names."""
    unpack("adapter", "hira", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    for name, message in (
        ("adapter_model.bin", "has adapter_model.bin, a pickle.*load it with PEFT and save it again"),
        ("adapter_model-00001-of-00002.safetensors", "has shards, adapter_model-00001-of-00002"),
        ("weights", "Pass the folder that PEFT's save_pretrained"),
    ):
        moved = file.rename(file.parent / name)
        for read in (jlora.info, lambda folder: jlora.peft.load(folder, jlora.trace(lambda p: p, {}), {})):
            with pytest.raises(FileNotFoundError, match=rf"no adapter_model.safetensors.*{message}"):
                read(file.parent)
        moved.rename(file)
    (tmp_path / "a").rename(tmp_path / "second")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config.json.*other names in the folders second"):
        jlora.peft.load(tmp_path, jlora.trace(lambda p: p, {}), {})
