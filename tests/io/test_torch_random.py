"""The random numbers of torch's generator: those that `golden/torch_random.py` recorded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from jlora.methods._common.torch_random import Generator
from tests.support.torch_draws import CALLS, SEEDS

GOLDEN = Path(__file__).parents[1] / "golden" / "torch_random.npz"
ROUNDING = 1e-6  # of the logarithm and the cosine, of numbers below 10


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws(seed):
    generator = Generator(seed)
    with np.load(GOLDEN) as golden:
        for number, (call, *args) in enumerate(CALLS):
            drawn, expected = getattr(generator, call)(*args), golden[f"{seed}/{number}"]
            assert (drawn.dtype, drawn.shape) == (expected.dtype, expected.shape)
            if call == "normal":
                np.testing.assert_allclose(drawn, expected, rtol=0, atol=ROUNDING)
            else:
                np.testing.assert_array_equal(drawn, expected, err_msg=f"{call}{args}")


if importlib.util.find_spec("torch"):

    def test_live():
        """The golden file holds what torch draws."""
        from tests.golden import torch_random

        with np.load(GOLDEN) as golden:
            recorded = torch_random.records()
            assert set(recorded) == set(golden.files)
            for key, drawn in recorded.items():
                np.testing.assert_array_equal(drawn, golden[key])
