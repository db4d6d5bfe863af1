"""Kernels that a GPU runs in one step, and the bytes that they read and write."""

import collections
import dataclasses
import re
from collections.abc import Mapping

from jlora._plan.cost import KINDS
from jlora._plan.hlo import Computation, Instruction, Program, array_names, arrays, called, root, size_in_bytes
from jlora._plan.products import library_call, product_flops

# Instructions that run nothing on the GPU themselves.
_NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "add-dependency", "partition-id", "replica-id", "optimization-barrier", "domain"),
    *("async-start", "async-update", "async-done", "copy-done", "send-done", "recv-done"),
}
_VIEWS = ("bitcast", "reshape", "convert", "copy", "transpose")


@dataclasses.dataclass(frozen=True)
class Kernels:
    """What one GPU runs in one step beside collectives, over all iterations of loops of known length.

    Arguments:
        count: how many kernels run.
        products: how many of them compute a product or a convolution.
        fused_products: how many of these compute more in the same kernel: an addition to another result (`beta`), or
            what follows the product.
        bytes_moved: bytes that the kernels read and write. Of an array that a kernel slices, the slice counts.
        float32_bytes: bytes of the float32 arrays that they write.
        largest_bytes: bytes of the largest array that one of them writes.
        wide: of the float32 arrays that they write, those in the shape of a 16-bit array of the program, as a float32
            copy of it would be: shape without axes of size 1, in ascending order, such as `16x4096` -> how many.
    """

    count: int = 0
    products: int = 0
    fused_products: int = 0
    bytes_moved: int = 0
    float32_bytes: int = 0
    largest_bytes: int = 0
    wide: Mapping[str, int] = dataclasses.field(default_factory=dict)


def kernels(program: Program) -> Kernels:
    """Reads the kernels of a program that is compiled for GPUs."""
    sums, largest, float32 = [0] * 5, 0, collections.Counter[str]()
    for name in program.sequential:
        computation, (times, _) = program.computations[name], program.runs[name]
        for i in computation.values():
            if not is_kernel(i):
                continue
            inner = fused(i, program)
            written = _written(i, computation, inner)
            is_product = has_product(i, computation, inner)
            figures = [
                1,
                is_product,
                is_product and _is_fused(i, inner),
                sum(map(size_in_bytes, written)) + _read(i, computation, inner),
                sum(size_in_bytes(array) for array in written if array.startswith("f32")),
            ]
            sums = [total + times * figure for total, figure in zip(sums, figures, strict=True)]
            largest = max(largest, *map(size_in_bytes, written)) if times and written else largest
            for array in written:
                float32[_sorted_shape(array)] += times * array.startswith("f32")
    count, products, fused_products, bytes_moved, float32_bytes = sums
    narrow = _shapes_of_16_bits(program)
    wide = {shape: times for shape, times in sorted(float32.items()) if times and shape in narrow}
    return Kernels(count, products, fused_products, bytes_moved, float32_bytes, largest, wide)


def _shapes_of_16_bits(program: Program) -> set[str]:
    """The sorted shapes of all matrices of 16 bits; vectors are neither weights nor activations."""
    names = {name for run in program.computations.values() for i in run.values() for name in array_names(i.type)}
    shapes = {_sorted_shape(name) for name in names if name.startswith(("bf16", "f16"))}
    return {shape for shape in shapes if "x" in shape}


def _sorted_shape(array: str) -> str:
    """The shape of an array, `f32[1,4096,16]` as `16x4096`."""
    return "x".join(str(n) for n in sorted(arrays(array)[0][1]) if n != 1)


def is_kernel(i: Instruction) -> bool:
    """Whether an instruction runs a kernel; collectives do not count."""
    return i.opcode not in _NO_KERNEL and not any(i.opcode.startswith(kind) for kind in KINDS)


def fused(i: Instruction, program: Program) -> Computation | None:
    """The computation of a fusion, None for other instructions."""
    return program.computations[called(i)[0]] if i.opcode == "fusion" else None


def has_product(i: Instruction, computation: Computation, inner: Computation | None) -> bool:
    """Whether a kernel computes a product or a convolution."""
    run = computation if inner is None else inner
    types = {name: each.type for name, each in run.items()}
    return any(product_flops(each, types) for each in ([i] if inner is None else inner.values()))


def _is_fused(i: Instruction, inner: Computation | None) -> bool:
    """Whether the kernel of a product computes more than the product."""
    if inner is None:
        beta, epilogue = (re.search(rf'"{key}":"?([\w.-]+)', i.attributes) for key in ("beta", "epilogue"))
        adds = bool(beta) and float(beta[1]) != 0
        return bool(library_call(i)) and (adds or (bool(epilogue) and epilogue[1] != "DEFAULT"))
    last = root(inner)
    while last.opcode in _VIEWS:
        last = inner[last.operands[0]]
    return last.opcode not in ("dot", "convolution")


def _written(i: Instruction, computation: Computation, inner: Computation | None) -> list[str]:
    """Every array that a kernel writes, `f32[8]`; of one that it updates, the update."""
    return _results(i, computation) if inner is None else _results(root(inner), inner)


def _results(i: Instruction, computation: Computation) -> list[str]:
    if i.opcode == "tuple":
        return [array for name in i.operands for array in _results(computation[name], computation)]
    if i.opcode == "bitcast" and i.operands[0] in computation:
        return _results(computation[i.operands[0]], computation)
    if i.opcode == "dynamic-update-slice":
        return array_names(computation[i.operands[1]].type)
    has_workspace = library_call(i) != ""
    return array_names(i.type)[:1] if has_workspace else array_names(i.type)


def _read(i: Instruction, computation: Computation, inner: Computation | None) -> int:
    """Bytes that a kernel reads."""
    if inner is None:
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return size_in_bytes(i.type)
        operands = i.operands[1:] if i.opcode == "dynamic-update-slice" else i.operands
        return sum(size_in_bytes(computation[name].type) for name in operands)
    return sum(_used(p, inner) for p in inner.values() if p.opcode == "parameter")


def _used(value: Instruction, computation: Computation) -> int:
    """Bytes of a value that a fusion reads: all of them, or those of the slices that it takes."""
    size, total = size_in_bytes(value.type), 0
    for user in computation.values():
        if value.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _used(user, computation)
        elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == value.name:
            total += size_in_bytes(user.type)
        elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == value.name):
            return size
    return min(size, total)
