"""Devices to compile for: TPU slices and GPUs by name, which need not exist, and simulated devices of the CPU."""

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from jlora import _compat
from jlora._plan.gpu_cards import CARDS, target_config
from jlora._tree.short_forms import short_bytes

EXAMPLES = "v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8, v4:2x2x4, tpu7x:2x2x1, h100:8, l40s:2x4, cpu:8"

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

_CARD_OF = {card.name: card for card in CARDS.values()}
_GPU_COMPILERS = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")


def topology(name: str) -> tuple[Any, ...]:
    """The devices of a topology, for a mesh: `jax.make_mesh(shape, names, devices=jlora.topology("v5e:16x16"))`.

    Arguments:
        name: devices to compile for, which need not exist. A TPU generation and its chips along every axis of the
            torus, such as `"v5e:16x16"` or `"v5p:4x4x4"`; a GPU and the number of cards of one host, `"h100:8"`, or
            hosts x cards of each, `"h100:4x8"`. GPUs are a100-40, a100-80, a6000, h100, h200, b200, rtx6000pro, l4,
            l40s and rtx4090. `"cpu:8"` is the first eight simulated devices of the CPU.

    If no TPU is attached, libtpu is loaded with environment variables that keep it from searching for one; variables
    that are already set stay as they are. With libtpu or the CUDA plugin installed, set JAX_PLATFORMS=cpu, so that JAX
    does not search for devices either.

    Returns:
        the devices.

    Raises:
        ImportError: if the compiler is missing: libtpu for a TPU, `pip install 'jlora[plan]'`; the CUDA plugin of
            JAX in jaxlib's version for a GPU, `pip install 'jlora[plan-gpu]'`.
        ValueError: if there is no such topology, or if the CPU has too few devices.
    """
    kind, _, shape = name.partition(":")
    if kind == "cpu" and shape.isdecimal() and int(shape):
        return _cpu(int(shape))
    if kind in CARDS:
        return _gpu(name)
    if re.match(r"v\d|tpu", kind):
        return _tpu(name)
    close = difflib.get_close_matches(kind, CARDS, n=2)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"GPUs are {', '.join(CARDS)}."
    raise ValueError(f"There is no topology {name!r}. {hint} Topologies are for example {EXAMPLES}.")


def hbm(device: Any) -> int | None:
    """Bytes of a device's memory that a program can use; None if that is not known."""
    if device.device_kind in _CARD_OF:
        return int(_memory_fraction() * _CARD_OF[device.device_kind].memory)
    gibibytes = _HBM.get(device.device_kind)
    return None if gibibytes is None else int(gibibytes * 2**30)


def leaves_out(device: Any) -> str | None:
    """What the plan for a GPU does not contain; None for other devices."""
    card = _CARD_OF.get(device.device_kind)
    if card is None:
        return None
    return (
        f"JAX gives a program {100 * _memory_fraction():.4g}% of the card's {short_bytes(card.memory)} "
        "(XLA_CLIENT_MEM_FRACTION).\nNot contained: workspaces of tuned kernels, cuDNN and NCCL, code, fragmentation."
    )


def _memory_fraction() -> float:
    """The part of a GPU's memory that JAX gives to programs, by the environment variables that JAX reads."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    return float(next((value for name in names if (value := os.environ.get(name))), "0.75"))


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
def _gpu(name: str) -> tuple[Any, ...]:
    kind, _, shape = name.partition(":")
    sizes = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", shape)
    if not sizes:
        raise ValueError(
            f"There is no topology {name!r}: write the number of cards, {kind}:8, or hosts x cards of each, {kind}:4x8."
        )
    _check_gpu_compiler(name)
    hosts, cards = sizes[1] or "1", sizes[2]
    options = {"target_config": target_config(CARDS[kind]), "topology": f"1x{hosts}x{cards}"}
    return _compat.topology_devices(kind, "cuda", **options)


def _check_gpu_compiler(name: str) -> None:
    """Raises if the CUDA plugin of JAX is missing, or is not of jaxlib's version."""
    versions = {package: _version(package) for package in _GPU_COMPILERS}
    installed = {package: version for package, version in versions.items() if version}
    jaxlib = _version("jaxlib")
    if not installed:
        raise ImportError(
            f"Compiling for {name} requires the CUDA plugin of JAX {jaxlib}, which needs no GPU: "
            "pip install 'jlora[plan-gpu]'"
        )
    for package, version in installed.items():
        if version != jaxlib:
            raise ImportError(
                f"Compiling for {name} requires {package} in the version of jaxlib, {jaxlib}, and "
                f"{version} is installed: pip install --upgrade 'jlora[plan-gpu]' makes them equal."
            )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
