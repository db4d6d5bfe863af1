"""Devices to compile for: TPU slices by name, which need not exist, and simulated devices of the CPU."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import _compat

EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8, v4:2x2x4, tpu7x:2x2x1, cpu:8"

# Without these, libtpu asks a cloud's metadata server for its identity, reports on stderr that there is no answer, and
# refuses to be loaded by two processes, because a TPU can have one owner. Compilation needs none of that.
_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# Memory of a device in GiB that the compiler of libtpu 0.0.52 gives to a program. A chip has 16 GiB (v2), 32 (v3),
# 32 (v4), 16 (v5e), 95 (v5p), 32 (v6e) and 192 (TPU7x) by https://cloud.google.com/tpu/docs. A chip of v2, v3 and TPU7x
# is two devices.
_HBM = {
    "TPU v2": 7.48,
    "TPU v3": 15.48,
    "TPU v4": 30.75,
    "TPU v5 lite": 15.75,
    "TPU v5": 95.73,
    "TPU v6 lite": 31.24,
    "TPU7x": 94.74,
}


def topology(name: str) -> tuple[Any, ...]:
    """The devices of a topology, for a mesh: `jax.make_mesh(shape, names, devices=jlora.topology("v5e:16x16"))`.

    Arguments:
        name: a TPU generation and its chips along every axis of the torus, such as `"v5e:16x16"` or `"v5p:4x4x4"`:
            devices to compile for, which need not exist. `"cpu:8"` is the first eight simulated devices of the CPU.

    If no TPU is attached, libtpu is loaded with environment variables that keep it from searching for one; variables
    that are already set stay as they are. With libtpu installed, set JAX_PLATFORMS=cpu, so that JAX does not search
    either.

    Returns:
        the devices.

    Raises:
        ImportError: for a TPU, if libtpu is missing; `pip install 'jlora[plan]'` installs it.
        ValueError: if there is no such topology, or if the CPU has too few devices.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu" and shape.isdecimal() and int(shape):
        return _cpu(int(shape))
    return _tpu(name)


def hbm(device: Any) -> int | None:
    """Bytes of a device's memory that a program can use; None if that is not known."""
    gibibytes = _HBM.get(device.device_kind)
    return None if gibibytes is None else int(gibibytes * 2**30)


def _cpu(count: int) -> tuple[Any, ...]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"cpu:{count} needs {count} devices, and the CPU has {len(devices)}. Before JAX is first used, set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} or call "
            f'jax.config.update("jax_num_cpu_devices", {count}).'
        )
    return tuple(devices[:count])


@functools.cache
def _tpu(name: str) -> tuple[Any, ...]:
    if not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
        raise ImportError(f"Compiling for {name} requires libtpu, the TPU compiler: pip install 'jlora[plan]'")
    # JAX sees the two cores of a v4 chip as one device.
    options: dict[str, Any] = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        with _libtpu_environment():
            return _compat.topology_devices(name, "tpu", **options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(
            f"There is no topology {name!r} ({str(error).splitlines()[0]}). Topologies are for example {EXAMPLES}."
        ) from error


@contextlib.contextmanager
def _libtpu_environment() -> Iterator[None]:
    """Sets what libtpu needs if no TPU is attached; variables that are already set stay as they are."""
    attached = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    added = {} if attached else {name: value for name, value in _WITHOUT_A_TPU.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
