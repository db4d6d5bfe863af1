"""What the compiler reports of a program; JAX types these reports as ones that a backend may lack."""

from __future__ import annotations

from typing import Any

import jax


def text(compiled: jax.stages.Compiled) -> str:
    """The optimised program, as HLO text."""
    hlo = compiled.as_text()
    assert hlo is not None
    return hlo


def memory(compiled: jax.stages.Compiled) -> Any:
    """Bytes of arguments, outputs and temporaries."""
    stats = compiled.memory_analysis()
    assert stats is not None
    return stats


def flops(compiled: jax.stages.Compiled) -> float:
    analysis = compiled.cost_analysis()
    assert analysis is not None
    return analysis["flops"]
