"""What a training step takes on hardware that is not there, by the word of the compiler."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jlora._plan import hlo as _hlo
from jlora._plan import topology as _topology
from jlora._plan.hlo import Collective
from jlora._pretty import Table, short_bytes
from jlora._tree.paths import is_array, named_leaves

_OVER = re.compile(r"\(([\d.]+)([KMGTP]?)\) exceeds available HBM \(([\d.]+)([KMGTP]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGTP]?) of ([\d.]+)([KMGTP]?) hbm")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step takes of each chip. `print` shows it as tables, `json()` gives all of it.

    Arguments:
        topology: its name.
        device: the kind of a device, as JAX calls it. A device is a chip, or half a chip of v2, v3 and TPU7x.
        devices: how many there are.
        fits: whether the compiler finds room for the program; None where the memory is not known (the CPU).
        hbm: bytes of a device's memory that the compiler gives to a program; None where that is not known.
        needed: bytes that the program takes: arguments + outputs - aliased + temporaries + code. Where the compiler
            refuses the program, what it says it would take.
        argument_bytes, output_bytes, aliased_bytes, temporary_bytes, code_bytes: bytes a device; aliased are the
            outputs that take the place of donated arguments. None where the compiler refuses the program.
        flops: FLOPs of products and convolutions a device, loops counted as often as they run. What a custom kernel
            computes, the compiler does not know.
        bytes_accessed: the compiler's own count a device, in which the body of a loop counts once.
        exact: whether the lengths of all loops with products in them are known; others count once.
        collectives: what a device sends and receives, the heaviest first.
        refusal: what the compiler says where it refuses the program for lack of memory.
    """

    topology: str
    device: str
    devices: int
    fits: bool | None
    hbm: int | None
    needed: int
    argument_bytes: int | None = None
    output_bytes: int | None = None
    aliased_bytes: int | None = None
    temporary_bytes: int | None = None
    code_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    exact: bool = True
    collectives: tuple[Collective, ...] = ()
    refusal: str | None = None

    def json(self) -> str:
        """All of it as JSON, sizes in bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        verdict = {True: "it fits", False: "it does not fit", None: "compiled"}[self.fits]
        room = f" of {short_bytes(self.hbm)}" if self.hbm else ""
        head = f"{self.topology}, {self.devices} x {self.device}: {verdict}, {short_bytes(self.needed)}{room} a device"
        if self.refusal:
            return f"{head}\n{self.refusal}"
        names = ("argument", "temporary", "output", "aliased", "code")
        counts = [(f"{name} bytes", getattr(self, f"{name}_bytes")) for name in names]
        rows = [(name, f"{count:,}", short_bytes(count)) for name, count in counts]
        rows.append(("FLOPs of products", f"{self.flops:.4g}", "" if self.exact else "loops of unknown length once"))
        rows.append(("bytes accessed", f"{self.bytes_accessed:.4g}", "bodies of loops once"))
        parts = [head, Table(("a device", "", ""), rows, right=(1,)).text()]
        if not self.collectives:
            return "\n\n".join([*parts, "no collectives"])
        rows = [
            (c.kind, c.shape, f"{c.bytes:,}", f"{c.count:,}{'' if c.exact else '+'}", f"{c.bytes * c.count:,}")
            for c in self.collectives
        ]
        parts.append(Table(("collective", "shape", "bytes", "times", "in all"), rows, right=(2, 3, 4)).text())
        if not all(c.exact for c in self.collectives):
            parts.append("+: inside a branch or a loop of unknown length, counted once")
        return "\n\n".join(parts)

    __repr__ = __str__


def plan(step: Callable[..., Any], *args: Any, topology: str, **kwargs: Any) -> Plan:
    """Compiles a step ahead of time for devices that need not be there, and says what it takes of each.

    Arguments:
        step: any function that `jax.jit` could trace, or already a jitted one, whose donated arguments are respected.
            It is compiled under the topology's mesh (`jax.set_mesh`), so that it may name bare `PartitionSpec`s; a
            mesh of devices that it closes over must be made of `jlora.topology(name)`.
        args, kwargs: its arguments. Arrays may be `jax.ShapeDtypeStruct`; nothing is computed. Their shardings are
            `NamedSharding`s on one mesh of any kind, abstract (`jax.sharding.AbstractMesh`) or of other devices: its
            shape and axis names are laid over the topology. What has none is replicated.
        topology: a name such as `"v5e:16x16"`, as in `jlora.topology`.

    Returns:
        the plan. A program that the compiler refuses for lack of memory is one that does not fit, and no error.

    Raises:
        ImportError: without libtpu, which `pip install 'jlora[plan]'` installs.
        ValueError: where there is no such topology, or the arguments' mesh does not have as many devices.
    """
    devices = _topology.topology(topology)
    placed, mesh = _place(devices, topology, (args, kwargs))
    jitted = step if hasattr(step, "lower") else jax.jit(step)
    with jax.set_mesh(mesh):
        lowered = jitted.lower(*placed[0], **placed[1])  # pyright: ignore[reportFunctionMemberAccess]
        try:
            compiled, text = _compile(lowered, devices[0].platform)
        except jax.errors.JaxRuntimeError as error:
            found = _OVER.search(str(error)) or _USED.search(str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
                raise
            needed, room = _bytes(found[1], found[2]), _bytes(found[3], found[4])
            said = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
            return Plan(topology, devices[0].device_kind, len(devices), False, room, needed, refusal=said)
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is None or costs is None or text is None:
        raise NotImplementedError(f"The compiler for {topology} says nothing of memory or costs.")
    read = _hlo.cost(text)
    room = _topology.hbm(devices[0])
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    aliased = memory.alias_size_in_bytes
    return Plan(
        topology,
        devices[0].device_kind,
        len(devices),
        None if room is None else True,
        room,
        sum(sizes.values()) - aliased,
        **sizes,
        aliased_bytes=aliased,
        flops=read.flops,
        bytes_accessed=costs["bytes accessed"],
        exact=read.exact,
        collectives=read.collectives,
    )


def _compile(lowered: Any, platform: str) -> tuple[Any, str | None]:
    """The compiled program, and its text."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # The compiler writes the text itself, since jaxlib cannot read all that libtpu says: it refuses some updates of
    # asynchronous gathers (jaxlib 0.10.2, libtpu 0.0.52, v5p).
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        (file,) = Path(folder).glob("*.after_optimizations.txt")
        return compiled, file.read_text()


def _place(devices: Sequence[Any], name: str, tree: Any) -> tuple[Any, Mesh]:
    """The arguments as abstract arrays on the topology, and the mesh there."""
    meshes = {}
    for path, leaf in named_leaves(tree):
        sharding = getattr(leaf, "sharding", None) if is_array(leaf) else None
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            meshes.setdefault((tuple(mesh.shape.items()), mesh.axis_types), (path, mesh))
        elif sharding is not None and not isinstance(sharding, SingleDeviceSharding):
            raise ValueError(f"The argument {path} has {sharding}: a plan takes NamedShardings, or none.")
    if len(meshes) > 1:
        said = "; ".join(f"{path}: {mesh}" for path, mesh in meshes.values())
        raise ValueError(f"The arguments lie on more than one mesh: {said}.")
    if not meshes and len(devices) > 1:
        raise ValueError(
            f"{name} has {len(devices)} devices, and no argument says how it is divided over them: give "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)), where the mesh may "
            "be a jax.sharding.AbstractMesh."
        )
    _, mesh = next(iter(meshes.values()), ("", Mesh(list(devices), ("devices",))))
    if mesh.size != len(devices):
        raise ValueError(
            f"The arguments' mesh {dict(mesh.shape)} has {mesh.size} devices, and {name} has {len(devices)}."
        )
    if not (isinstance(mesh, Mesh) and set(mesh.devices.flat) == set(devices)):
        laid = create_device_mesh(tuple(mesh.shape.values()), devices, allow_split_physical_axes=True)
        mesh = Mesh(laid, mesh.axis_names, mesh.axis_types)

    def on(leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        given = getattr(leaf, "sharding", None)
        spec, kind = (given.spec, given.memory_kind) if isinstance(given, NamedSharding) else (PartitionSpec(), None)
        sharding = NamedSharding(mesh, spec, memory_kind=kind)
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding, weak_type=getattr(leaf, "weak_type", False)
        )

    return jax.tree.map(on, tree), mesh


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** (10 * " KMGTP".index(unit or " ")))
