"""Settings under which every test runs: strict promotion, warnings as errors, leak checks, and the draw of pairs."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Iterator

from tests.support.compiler import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices.
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {FLAGS}")

import jax
import pytest

from tests.support import draw

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def checked_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test if a tracer outlives its trace: in the nightly tests, and in modules marked `check_leaks`.

    Leak checks switch off JAX's caches, which doubles the time of tests that call JAX outside of `jax.jit`.
    """
    marks = {mark.name for mark in request.node.iter_markers()}
    with jax.checking_leaks() if marks & {"check_leaks", "nightly"} else contextlib.nullcontext():
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with the mark `drawn(n)` the default run takes one case in n, and the nightly run the others."""
    cases: dict[str, list[pytest.Item]] = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("drawn") and not item.get_closest_marker("nightly"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for test, of_test in cases.items():
        mark = of_test[0].get_closest_marker("drawn")
        assert mark is not None
        daily = draw.drawn_cases(test, len(of_test), *mark.args)
        for number, item in enumerate(of_test):
            if number not in daily:
                item.add_marker(pytest.mark.nightly)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"pairs of the law drawn by {draw.VARIABLE}={draw.SEED}")
