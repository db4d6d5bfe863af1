"""The slopes of the page on scaling: exact power laws, and the counts of small models."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks import _scaling_report, scaling
from benchmarks.scaling import Point


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    sizes = [1, 2, 4, 8]
    exponent, error = _scaling_report.slope(sizes, [3 * n**1.5 for n in sizes])
    assert exponent == pytest.approx(1.5)
    assert error < 1e-7
    exponent, error = _scaling_report.slope(sizes, [np.e, 1, 1, np.e])
    assert exponent == pytest.approx(0)
    assert error == pytest.approx(1 / np.sqrt(10) / np.log(2) * 1.0, rel=0.2)


def test_work_grows_linearly_with_depth_and_tokens() -> None:
    """Equations, and FLOPs before compilation, of the adapted gradient."""
    depths = [Point(depth=size, width=32, tokens=64, rank=2) for size in (1, 2, 4)]
    tokens = [Point(depth=1, width=32, tokens=size, rank=2) for size in (64, 128, 256)]
    with jax.numpy_rank_promotion("allow"):
        counts = {point: scaling.count(point, length=16) for point in dict.fromkeys(depths + tokens)}
    equations, flops = ({point: count[k] for point, count in counts.items()} for k in (0, 1))
    for values, points in ((flops, depths), (flops, tokens), (equations, depths)):
        one, two, four = (values[point] for point in points)
        assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
    assert len({equations[point] for point in tokens}) == 1
    exponent, _ = _scaling_report.slope([64, 128, 256], [flops[point] for point in tokens])
    assert exponent == pytest.approx(1.0, abs=0.01)
