"""Temporary bytes of one product with the gradient of its input, in activations, from the compiled program."""

import pytest

import jlora
from benchmarks import _site


@pytest.mark.parametrize(
    ("method", "limit"),
    [
        (jlora.LoRA(16), 1.05),
        (jlora.GroupedLoRA(16, groups=2), 1.05),
        (jlora.GroupedLoRA(16, groups=2, enable=(False, True)), 1.05),
        (jlora.DoRA(16), 1.15),
        (jlora.LoKr(8), 1.5),
        (jlora.LoKr(16), 2.2),
        (jlora.GraLoRA(16, 4), 1.15),
        (jlora.OFT(16), 1.05),
        (jlora.OFT(16, shared=True), 1.05),
        (jlora.BOFT(16), 1.15),
        (jlora.BDLoRA(16, 4), 1.15),
        (jlora.BDLoRA(16, 4, "in"), 1.15),
        (jlora.QALoRA(16), 1.15),
        (jlora.RoAd(1, 64), 1.15),
        (jlora.RoAd(4, 2), 1.15),
        (jlora.IA3(), 1.15),
    ],
    ids=[
        "lora",
        "two groups",
        "one of two groups",
        "dora",
        "lokr",
        "lokr of full factors",
        "blocks of both",
        "rotations",
        "one rotation",
        "butterflies",
        "blocks of B",
        "blocks of A",
        "equal rows",
        "halves",
        "neighbours",
        "a multiplier",
    ],
)
def test_temporaries_in_activations(method: jlora.Method, limit: float) -> None:
    assert _site.activations(_site.program(method, 1024), 1024) <= limit


def test_a_multiplier_beside_an_update_needs_one_activation_more() -> None:
    assert _site.activations(_site.program(jlora.GLoRA(16), 1024), 1024) <= 2.1
