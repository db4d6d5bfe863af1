"""Every method on the kernels of experts, over ranks below, at and above the number of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support.agreement import adapter_for, check_law
from tests.support.methods import METHODS

Use = Callable[[Any, jax.Array, jax.Array], jax.Array]

# Two rows more than the groups have: a ragged product makes them zero.
ROWS, GROUPS = 9, (4, 3)

USES: dict[str, tuple[str, Use]] = {
    "ragged": ("eio", lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"], sizes)),
    "ragged_out_in": ("eoi", lambda p, x, sizes: jax.lax.ragged_dot(x, p["w"].mT, sizes)),
    "ragged_experts_last": ("ioe", lambda p, x, sizes: jax.lax.ragged_dot(x, jnp.moveaxis(p["w"], -1, 0), sizes)),
    "batched": (
        "eio",
        lambda p, x, sizes: jnp.einsum("ebi,eio->ebo", jnp.stack([x, *[2 * x] * (len(sizes) - 1)]), p["w"]),
    ),
    "of_one_input": ("eio", lambda p, x, sizes: jnp.einsum("bi,eio->ebo", x, p["w"])),
}

SIZES = [(2, 6, 8), (3, 4, 4), (4, 6, 4), (16, 4, 2)]  # experts, in, out


def ranks(method: jlora.Method, experts: int) -> Iterator[jlora.Method]:
    """The method in every rank that it may have."""
    names = {field.name for field in dataclasses.fields(method)} & {"rank", "coefficients", "count", "entries"}
    for rank in {1, 2, 3, experts - 1, experts, experts + 1} if names else {0}:
        try:
            yield dataclasses.replace(method, **dict.fromkeys(names, rank))
        except ValueError:  # a rank that another field does not allow
            continue


def hold(use: str, method: jlora.Method, sizes: tuple[int, int, int], on_dense: str = "allow") -> bool:
    """The law, with gradients; False if the method does not fit the weight."""
    layout, program = USES[use]
    experts, inner, outer = sizes
    shape = tuple({"e": experts, "i": inner, "o": outer}[axis] for axis in layout)
    rng = np.random.default_rng(experts)
    params = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(ROWS, inner)), jnp.float32)
    group_sizes = jnp.asarray([*GROUPS, *[0] * (experts - 2)], jnp.int32)
    sites = jlora.trace(program, params, x, group_sizes)
    if method.unsupported_reason(sites["w"]) or method.init_needs_weight:
        return False
    adapter = adapter_for(sites, {"w": method}, rng, size=0.5)
    check_law(program, params, adapter, x, group_sizes, bound=1e-4, on_dense=on_dense)
    return True


@pytest.mark.drawn(3)
@pytest.mark.parametrize("use", ["ragged", "ragged_experts_last"])
@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        (jlora.VeRA(1), (2, 6, 8)),
        (jlora.VeRA(2), (4, 6, 4)),
        (jlora.VeRA(2), (16, 4, 2)),
        (jlora.LoHa(3), (3, 4, 4)),
        (jlora.LoRA(4), (4, 6, 4)),
        (jlora.SharedLoRA(2), (4, 6, 4)),
        (jlora.SharedLoRA(2, shared="b"), (3, 4, 4)),
    ],
    ids=repr,
)
def test_a_factor_for_each_expert(use: str, method: jlora.Method, sizes: tuple[int, int, int]) -> None:
    assert hold(use, method, sizes)


@pytest.mark.parametrize(
    ("method", "use"),
    [
        (jlora.LoKr(1), "ragged"),
        (jlora.LoKr(None), "ragged_out_in"),
        (jlora.GroupedLoRA(1, groups=2, enable=(False, True)), "ragged"),
        (jlora.GraLoRA(2, 2), "ragged_experts_last"),
    ],
    ids=repr,
)
def test_blocks_of_experts_stay_factored(method: jlora.Method, use: str) -> None:
    assert hold(use, method, (2, 6, 8), on_dense="error")


@pytest.mark.nightly
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", METHODS)
def test_experts_at_length(use: str, name: str) -> None:
    for sizes in SIZES:
        for method in (option for candidate in METHODS[name] for option in ranks(candidate, sizes[0])):
            hold(use, method, sizes)
