"""FLOPs of products and convolutions, as instructions of HLO and as calls of the libraries of GPUs."""

import math
import re

from jlora._plan.hlo import Instruction, arrays

_Shape = tuple[int, ...]

# Operands and results of cuDNN's convolutions, as indices into (first operand, second operand, result): which of them
# are the input, the kernel and the output of the convolution that the labels describe.
_CUDNN = {
    "__cudnn$convForward": (0, 1, 2),
    "__cudnn$convBiasActivationForward": (0, 1, 2),
    "__cudnn$convBackwardInput": (2, 1, 0),
    "__cudnn$convBackwardFilter": (0, 2, 1),
}


def product_flops(i: Instruction, types: dict[str, str]) -> float:
    """FLOPs of a product or a convolution, two for each multiply-add; 0 for any other instruction.

    Arguments:
        i: the instruction.
        types: of the values in its computation, by name.
    """
    target = library_call(i)
    is_product = i.opcode == "dot" or target.startswith("__cublas$")
    if not (is_product or i.opcode == "convolution" or target in _CUDNN):
        return 0.0
    out = arrays(i.type)[0][1]  # a library's result has a workspace after it
    left, right = (arrays(types[name])[0][1] for name in i.operands[:2])
    if is_product:
        pattern = r'lhs_contracting_dim(?:ension)?s"?[=:][{[]([\d,"]*)[}\]]'
        inner = re.search(pattern, i.attributes)
        return 2.0 * math.prod(out) * math.prod(left[int(k)] for k in re.findall(r"\d+", inner[1] if inner else ""))
    shapes = left, right, out
    return 2.0 * convolution_taps(i.attributes, *(shapes[k] for k in _CUDNN.get(target, (0, 1, 2))))


def library_call(i: Instruction) -> str:
    """What a custom call runs, `__cublas$gemm`; "" for any other instruction."""
    target = re.search(r'custom_call_target="([^"]*)"', i.attributes) if i.opcode == "custom-call" else None
    return target[1] if target else ""


def convolution_taps(attributes: str, left: _Shape, right: _Shape, out: _Shape) -> int:
    """Multiplications of a convolution, without those by padding and by the holes of a dilated input."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels, attributes
    window = (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]
    fields = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\dx_-]+)", window)}
    taps = 1
    for k in sorted(int(c) for c in labels[2] if c.isdigit()):
        length, size, n = (
            shape[label.index(str(k))]
            for shape, label in zip((left, right, out), (labels[1], labels[2], labels[3]), strict=True)
        )
        taps *= _taps({key: values[k] for key, values in fields.items()}, length, size, n)
    batch, features, channels = out[labels[3].index("b")], out[labels[3].index("f")], right[labels[2].index("i")]
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return taps * batch * features * channels // (int(groups[1]) if groups else 1)


def _taps(window: dict[str, str], length: int, size: int, outputs: int) -> int:
    """Along one spatial axis, how many pairs of an output and an entry of the kernel meet an entry of the input."""
    stride, dilation = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    kernel_dilation, low = int(window.get("rhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    positions = (o * stride + t * kernel_dilation - low for o in range(outputs) for t in range(size))
    return sum(p % dilation == 0 and 0 <= p // dilation < length for p in positions)
