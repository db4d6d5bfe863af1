"""Memory, FLOPs and collectives of a step on hardware that need not exist, as reported by the compiler."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jlora._plan import topology as _topology
from jlora._plan.cost import Collective, cost
from jlora._plan.dequantised import Dequantised, dequantised
from jlora._plan.hlo import parse
from jlora._plan.kernels import Kernels, kernels
from jlora._tree.paths import is_array, named_leaves
from jlora._tree.short_forms import short_bytes
from jlora._tree.tables import Table

_OVER = re.compile(r"\(([\d.]+)([KMGTP]?)\) exceeds available HBM \(([\d.]+)([KMGTP]?)\)")
_NO_ASSEMBLER = re.compile(r"No PTX compilation provider|libdevice")
_USED = re.compile(r"Used ([\d.]+)([KMGTP]?) of ([\d.]+)([KMGTP]?) hbm")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step needs on each device. `print` shows it as tables, `json()` returns all of it.

    Arguments:
        topology: the name of the topology.
        device: the kind of a device, as JAX calls it. A device is a GPU, a chip of a TPU, or half a chip of v2, v3 and
            TPU7x.
        devices: the number of devices.
        fits: whether the program fits into the memory of a device; None if its size is not known (the CPU).
        hbm: bytes of a device's memory that a program can use; None if that is not known. Of a GPU JAX gives a program
            75%, or the part that XLA_CLIENT_MEM_FRACTION says.
        needed: bytes that the program needs: arguments + outputs - aliased + temporaries + code. If the compiler
            refuses the program, the number in its message.
        argument_bytes, output_bytes, aliased_bytes, temporary_bytes, code_bytes: bytes on each device. Aliased outputs
            reuse the buffers of donated arguments. None if the compiler refuses the program.
        flops: FLOPs of products and convolutions on each device, over all iterations of loops. Those of custom kernels
            are unknown to the compiler and do not count.
        bytes_accessed: the compiler's own count for each device, in which the body of a loop counts once. None for
            GPUs, whose compiler counts nothing: see `kernels`.
        exact: whether the lengths of all loops with products in them are known. Loops of unknown length count once.
        collectives: what a device sends and receives, in descending order of bytes.
        refusal: the compiler's message if it refuses the program for lack of memory.
        kernels: of GPUs, the kernels of a step and the bytes that they move.
        dequantised: of GPUs, the weights that kernels dequantise and write.
        leaves_out: what the figures do not contain.
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
    kernels: Kernels | None = None
    dequantised: Dequantised | None = None
    leaves_out: str | None = None

    def json(self) -> str:
        """The plan as JSON, sizes in bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        verdict = {True: "it fits", False: "it does not fit", None: "compiled"}[self.fits]
        room = f" of {short_bytes(self.hbm)}" if self.hbm else ""
        head = f"{self.topology}, {self.devices} x {self.device}: {verdict}, {short_bytes(self.needed)}{room} a device"
        if self.refusal:
            return f"{head}\n{self.refusal}"
        parts = [head, self._sums().text(), self._collectives().text() if self.collectives else "no collectives"]
        return "\n\n".join([*parts, self.leaves_out] if self.leaves_out else parts)

    def _sums(self) -> Table:
        """Bytes and FLOPs of a device."""
        names = ("argument", "temporary", "output", "aliased", "code")
        sizes = [(f"{name} bytes", getattr(self, f"{name}_bytes")) for name in names]
        rows = [(name, f"{size:,}", short_bytes(size)) for name, size in sizes]
        rows.append(("FLOPs of products", f"{self.flops:.4g}", "" if self.exact else "loops of unknown length once"))
        if self.bytes_accessed is not None:
            rows.append(("bytes accessed", f"{self.bytes_accessed:.4g}", "bodies of loops once"))
        if self.kernels is not None:
            rows.append(("kernels", f"{self.kernels.count:,}", f"{self.kernels.products:,} of them products"))
            rows.append(("bytes moved", f"{self.kernels.bytes_moved:,}", "by kernels, all iterations"))
        if self.dequantised is not None and self.dequantised.count:
            size = self.dequantised.bytes
            rows.append(("dequantised bytes", f"{size:,}", f"{short_bytes(size)} at one time"))
        return Table(("a device", "", ""), rows, right=(1,))

    def _collectives(self) -> Table:
        rows = [
            (c.kind, c.shape, f"{c.bytes:,}", f"{c.count:,}{'' if c.exact else '+'}", f"{c.bytes * c.count:,}")
            for c in self.collectives
        ]
        inexact = not all(c.exact for c in self.collectives)
        foot = "\n+: inside a branch or a loop of unknown length, counted once" if inexact else ""
        return Table(("collective", "shape", "bytes", "times", "total bytes"), rows, right=(2, 3, 4), foot=foot)

    __repr__ = __str__


def plan(step: Callable[..., Any], *args: Any, topology: str, **kwargs: Any) -> Plan:
    """Compiles a step for TPUs or GPUs that this machine need not have, and reports what it needs on each of them.

    Nothing is computed, so all arrays may be `jax.ShapeDtypeStruct`.

    Arguments:
        step: any function that `jax.jit` could trace, or a jitted one, whose donated arguments are respected. It is
            compiled under the topology's mesh (`jax.set_mesh`), so it may use bare `PartitionSpec`s. If it closes over
            a mesh of devices, make that mesh from `jlora.topology(name)`.
        args, kwargs: its arguments. Their shardings are `NamedSharding`s on one mesh of any kind, abstract
            (`jax.sharding.AbstractMesh`) or of other devices: the plan uses that mesh's shape and axis names. Arrays
            without a sharding are replicated.
        topology: a name such as `"v5e:16x16"` or `"h100:8"`, as in `jlora.topology`.

    Programs for GPUs are compiled without trying kernels, for which a GPU would be needed. The plan leaves out the
    workspaces of tuned kernels, of cuDNN and of NCCL, code, and what fragmentation takes.

    Returns:
        the plan. If the program does not fit, `fits` is False; that is not an error. The compiler for TPUs refuses such
        a program; that for GPUs does not, and the plan compares what it needs with the memory of the card.

    Raises:
        ImportError: if the compiler is missing: `pip install 'jlora[plan]'` installs that for TPUs,
            `pip install 'jlora[plan-gpu]'` that for GPUs.
        ValueError: if there is no such topology, or if the arguments' mesh has another number of devices.
    """
    devices = _topology.topology(topology)
    (args, kwargs), mesh = _placed((args, kwargs), devices, topology)
    jitted = step if hasattr(step, "lower") else jax.jit(step)
    about = topology, devices[0].device_kind, len(devices)
    with jax.set_mesh(mesh):
        lowered = jitted.lower(*args, **kwargs)  # pyright: ignore[reportFunctionMemberAccess]
        try:
            compiled, text = _compile(lowered, devices[0].platform)
        except jax.errors.JaxRuntimeError as error:
            message = str(error)
            figures = _OVER.search(message) or _USED.search(message)
            if "RESOURCE_EXHAUSTED" not in message or figures is None:
                raise
            needed, hbm = _bytes(figures[1], figures[2]), _bytes(figures[3], figures[4])
            refusal = message.splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
            return Plan(*about, fits=False, hbm=hbm, needed=needed, refusal=refusal)
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is None or text is None:
        raise NotImplementedError(f"The compiler for {topology} reports no memory.")
    hbm, program = _topology.hbm(devices[0]), parse(text)
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    aliased = memory.alias_size_in_bytes
    needed, work, is_gpu = sum(sizes.values()) - aliased, cost(program), devices[0].platform == "gpu"
    return Plan(
        *about,
        # The compiler for TPUs has refused what does not fit.
        fits=None if hbm is None else needed <= hbm or not is_gpu,
        hbm=hbm,
        needed=needed,
        **sizes,
        aliased_bytes=aliased,
        flops=work.flops,
        bytes_accessed=analysis["bytes accessed"] if analysis else None,
        exact=work.exact,
        collectives=work.collectives,
        kernels=kernels(program) if is_gpu else None,
        dequantised=dequantised(program) if is_gpu else None,
        leaves_out=_topology.leaves_out(devices[0]),
    )


def _compile(lowered: Any, platform: str) -> tuple[Any, str | None]:
    """The compiled program and its HLO text."""
    if platform == "tpu":
        # The compiler writes the text, because jaxlib cannot parse all programs of libtpu: it refuses some updates of
        # asynchronous gathers (jaxlib 0.10.2, libtpu 0.0.52, v5p).
        with tempfile.TemporaryDirectory() as folder:
            compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            (file,) = Path(folder).glob("*.after_optimizations.txt")
            return compiled, file.read_text()
    options = {"xla_gpu_autotune_level": 0} if platform == "gpu" else {}
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if platform == "gpu" and _NO_ASSEMBLER.search(str(error)):
            raise ImportError(
                "Compiling for a GPU requires ptxas and libdevice of CUDA, which are not installed: "
                "pip install 'jlora[plan-gpu]'"
            ) from error
        raise
    return compiled, compiled.as_text()


def _placed(tree: Any, devices: Sequence[Any], name: str) -> tuple[Any, Mesh]:
    """The arguments as abstract arrays on the topology, and the mesh there."""
    mesh = _mesh_of(tree)
    if mesh is None and len(devices) > 1:
        raise ValueError(
            f"{name} has {len(devices)} devices, and no argument says how it is divided over them: give "
            "jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)), where the mesh may "
            "be a jax.sharding.AbstractMesh."
        )
    mesh = Mesh(list(devices), ("devices",)) if mesh is None else mesh
    if mesh.size != len(devices):
        raise ValueError(
            f"The arguments' mesh {dict(mesh.shape)} has {mesh.size} devices, and {name} has {len(devices)}."
        )
    if not (isinstance(mesh, Mesh) and set(mesh.devices.flat) == set(devices)):
        grid = create_device_mesh(tuple(mesh.shape.values()), devices, allow_split_physical_axes=True)
        mesh = Mesh(grid, mesh.axis_names, mesh.axis_types)
    return jax.tree.map(lambda leaf: _on_mesh(leaf, mesh) if is_array(leaf) else leaf, tree), mesh


def _mesh_of(tree: Any) -> Mesh | AbstractMesh | None:
    """The one mesh of all arguments with a sharding, None if none has one."""
    meshes = {}
    for path, leaf in named_leaves(tree):
        sharding = getattr(leaf, "sharding", None) if is_array(leaf) else None
        if isinstance(sharding, NamedSharding):
            mesh = sharding.mesh
            meshes.setdefault((tuple(mesh.shape.items()), mesh.axis_types), (path, mesh))
        elif sharding is not None and not isinstance(sharding, SingleDeviceSharding):
            raise ValueError(f"The argument {path} has {sharding}: a plan takes NamedShardings, or none.")
    if len(meshes) > 1:
        listed = "; ".join(f"{path}: {mesh}" for path, mesh in meshes.values())
        raise ValueError(f"The arguments are placed on more than one mesh: {listed}.")
    return next((mesh for _, mesh in meshes.values()), None)


def _on_mesh(leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The abstract array with the same spec on another mesh."""
    given = getattr(leaf, "sharding", None)
    spec, memory = (given.spec, given.memory_kind) if isinstance(given, NamedSharding) else (PartitionSpec(), None)
    sharding = NamedSharding(mesh, spec, memory_kind=memory)
    weak_type = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak_type)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** (10 * " KMGTP".index(unit or " ")))
