"""Sizes that a configuration of PEFT states, and that its tensors have not: such a file is refused with both."""

from __future__ import annotations

from typing import Any

import pytest

import jlora
from tests.io import test_peft_maps as maps
from tests.io.test_peft_types import GOLDEN, PARAMS, SITES, unpack
from tests.support import peft_types
from tests.support.peft_files import change_configuration

# Of a recorded file the fields that change, and what the error says: the path, both sizes, and what to do.
ONE = r"layers/kernel \(layers.0\): the "
OUT = r"out/kernel \(out\): the "
TO_DO = r"\. .* save it again with PEFT\. .* write {} into the configuration"
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    (
        "hira",
        {"r": 3},
        ONE + "rank of its tensors is 2, and r or rank_pattern in adapter_config.json gives 3" + TO_DO.format(2),
    ),
    ("delora", {"r": 3}, ONE + "rank of its tensors is 2, .* gives 3" + TO_DO.format(2)),
    ("delora", {"rank_pattern": {}}, OUT + "rank of its tensors is 3, .* gives 2" + TO_DO.format(3)),
    (
        "delora",
        {"rank_pattern": {"out": 3, "layers.1": 4}},
        r"layers/kernel \(layers.1\): .* rank of its tensors is 2, .* gives 4",
    ),
    ("miss", {"r": 2}, ONE + "rank of its tensors is 4, and r in .* gives 2" + TO_DO.format(4)),
    ("miss_of_another_size", {"r": 4}, ONE + "rank of its tensors is 3, .* gives 4"),
    ("miss_mini", {"mini_r": 2}, ONE + "number of columns of its tensors is 4, and mini_r in .* gives 2"),
    ("osf", {"effective_rank": 6}, ONE + "number of singular values that are not trained .* 5, .* gives 6"),
    ("osf", {"effective_rank": 0.25}, ONE + ".* 5, .* gives 2"),
    ("osf", {"effective_rank": None}, ONE + ".* 5, .* gives 4"),
    ("osf_of_no_rank", {"rank_pattern": {"out": 3}}, OUT + ".* 4, .* gives 3"),
    ("hra_biases", {"r": 3}, ONE + "rank of its tensors is 2, and r in .* gives 3"),
    (
        "c3a",
        {"block_size": 8},
        ONE + "block size of its tensors is 4, and block_size or block_size_pattern in .* gives 8",
    ),
    ("c3a", {"block_size_pattern": {}}, OUT + "block size of its tensors is 2, .* gives 4"),
    ("fourierft", {"n_frequency": 12}, ONE + "number of coefficients of its tensors is 11, .* gives 12"),
    ("fourierft", {"n_frequency_pattern": {"(": 30}}, "no regular expression"),
    ("waveft", {"n_frequency_pattern": {"out": 5}}, OUT + "number of coefficients of its tensors is 19, .* gives 5"),
    ("tinylora", {"r": 3}, r"tinylora_A has rank 2, and r = 3 .* write the rank of the tensors there"),
    ("tinylora", {"weight_tying": 0.0}, r"one vector .* weight_tying = 0\.0 gives its 3 modules 3"),
    ("tinylora", {"weight_tying": "all"}, "no number in the place of one"),
    ("vblora", {"save_only_topk_weights": True}, "all logits, .* write False"),
    ("hira", {"r": "2"}, ONE + "rank of its tensors is 2, .* gives 2"),
    ("osf", {"effective_rank": "much"}, r"layers.0.*no number.*much"),
]


@pytest.mark.parametrize(("name", "fields", "message"), CHANGES)
def test_a_size_that_the_tensors_have_not_is_refused(name, fields, message, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    change_configuration(tmp_path / "a", **fields)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("delora", {"r": 3, "rank_pattern": {"layers.[01]": 2}}),
        ("osf", {"effective_rank": 0.65}),
        ("osf_of_no_rank", {"rank_pattern": {"ut": 0.5, "out": 3}}),  # the first one that occurs in the name
        ("osf_of_no_rank", {"effective_rank": 20}),  # as many as there are
        ("c3a", {"block_size": 2, "block_size_pattern": {"[01]": 4}}),
    ],
)
def test_sizes_are_stated_in_several_ways(name, fields, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    want = jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)
    change_configuration(tmp_path / "a", **fields)
    assert jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS).keys() == want.keys()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("oft", {"oft_block_size": 2}, "block size of its tensors is 4, and oft_block_size in .* gives 2"),
        ("oft", {"oft_block_size": 0, "r": 4}, "block size of its tensors is 4, and r in .* gives 2"),
        (
            "oft",
            {"oft_block_size": 3},
            "block size of its tensors is 4, .* gives 2",
        ),  # the nearest divisor of 8, the smaller of two
        ("oft", {"oft_block_size": 5}, ""),
        ("oft_blocks", {"r": 5}, ""),
        ("oft_blocks", {"oft_block_size": 4}, "block size of its tensors is 2, and oft_block_size in .* gives 4"),
        ("boft", {"boft_block_size": 2}, "block size of its tensors is 4, and boft_block_size in .* gives 2"),
        (
            "boft",
            {"boft_block_size": 0, "boft_block_num": 4},
            "block size of its tensors is 4, and boft_block_num in .* gives 2",
        ),
        ("boft", {"boft_n_butterfly_factor": 2}, ""),  # as PEFT writes it on a machine without its extension
        ("hra", {"r": 2}, "rank of its tensors is 4, and r in .* gives 2"),
        ("deft", {"r": 5}, "rank of its tensors is 3, and r in .* gives 5"),
        ("para", {"r": 2}, "rank of its tensors is 3, and r in .* gives 2"),
    ],
)
def test_sizes_of_rotations(name, fields, message, tmp_path):
    folder = maps.write(tmp_path / "a", maps.config_of(name) | fields, maps.tensors_of(name))
    if not message:
        assert list(maps.load(folder)) == list(maps.load(folder))
        return
    with pytest.raises(ValueError, match=rf"w \(0\): the {message}"):
        maps.load(folder)


def test_every_type_that_is_read_by_its_tensors_was_recorded():
    assert {name for name, _, _ in CHANGES} <= set(GOLDEN["adapter"])
