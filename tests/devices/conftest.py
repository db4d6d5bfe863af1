"""Programs on several devices run without the check of leaked tracers."""

import pytest


@pytest.fixture(autouse=True)
def checked_leaks() -> None:
    """In the place of the check of `tests/conftest.py`.

    JAX itself (0.10.2 and 0.12) leaks a tracer in the gradient of a `psum` inside of `shard_map`, without jlora too:
    `jax.jit(jax.grad(f)).lower(...)` raises under `jax.checking_leaks()`.
    """
