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
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    platform = getattr(device, "platform", device) or jax.default_backend()
    return platform == "cpu" and has_no_mesh(*arrays)


def has_no_mesh(*arrays: Any) -> bool:
    """Whether no mesh is in sight: neither a context mesh nor one in the arrays' types."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(a).sharding.mesh for a in arrays)]
    return all(mesh.empty for mesh in meshes)
