"""Which devices a program is for."""

from typing import Any

import jax
from jax.experimental import topologies


def is_single_device(ctx: Any) -> bool:
    """Whether a lowering rule's context is a program for a single device."""
    return getattr(ctx.module_context.axis_context, "num_devices", 0) == 1


def topology_devices(name: str, platform: str, **options: Any) -> tuple[Any, ...]:
    """The devices of a topology to compile for, which need not exist."""
    return tuple(topologies.get_topology_desc(name, platform=platform, **options).devices)


def is_for_cpu(*arrays: Any) -> bool:
    """Whether a program is traced for the CPU, as far as is known: it is the default device, and there is no mesh."""
    return _default_platform() == "cpu" and has_no_mesh(*arrays)


def is_for_gpu(*arrays: Any) -> bool:
    """Whether a program is traced for GPUs, as far as is known."""
    return _platform(*arrays) in ("gpu", "cuda", "rocm")


def is_for_accelerator(*arrays: Any) -> bool:
    """Whether a program is traced for GPUs, TPUs or other accelerators, as far as is known."""
    return _platform(*arrays) != "cpu"


def has_auto_mesh(*arrays: Any) -> bool:
    """Whether the context has a mesh whose axes the compiler alone divides, and none is in the arrays' types."""
    mesh = jax.sharding.get_abstract_mesh()
    types = [jax.typeof(a).sharding.mesh for a in arrays if isinstance(a, jax.Array)]
    meshes = [mesh, *(m for m in types if not m.empty)]
    return not mesh.empty and all(set(m.axis_types) == {jax.sharding.AxisType.Auto} for m in meshes)


def has_no_mesh(*arrays: Any) -> bool:
    """Whether no mesh is in sight: neither a context mesh nor one in the arrays' types."""
    return all(mesh.empty for mesh in _meshes(*arrays))


def has_one_device(*arrays: Any) -> bool:
    """Whether no mesh in sight has several devices."""
    return all(mesh.empty or mesh.size == 1 for mesh in _meshes(*arrays))


def _platform(*arrays: Any) -> str:
    """The platform of a program, as far as is known: by the meshes in sight, or else the default device's."""
    devices = [getattr(mesh, "abstract_device", None) for mesh in _meshes(*arrays)]
    # The abstract device of JAX 0.10.0 has no platform.
    platforms = [device.platform for device in devices if device is not None and hasattr(device, "platform")]
    return platforms[0] if platforms else _default_platform()


def _default_platform() -> str:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return getattr(device, "platform", device) or jax.default_backend()


def _meshes(*arrays: Any) -> list[Any]:
    """The context mesh, and those in the arrays' types."""
    return [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in arrays)]
