"""The forms of a module's tensors in files of kohya, LyCORIS and diffusers, and the method that each is.

The axes of each tensor are spelled as in `jlora.io.peft.layouts`.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jlora.io.kohya import kronecker
from jlora.io.kohya.content import ModuleContent, layout
from jlora.io.kohya.keys import REFUSED
from jlora.io.peft.layouts import Layout
from jlora.methods import DoRA, Full, LoCon, LoHa, LoKr, LoRA
from jlora.methods._base import Method

Arrays = Mapping[str, np.ndarray]


class Form(NamedTuple):
    """How a method is stored: the class, and the layout of its factors."""

    method: type[Method]
    layout: Layout

    @property
    def tensors(self) -> set[str]:
        """The names of its tensors."""
        return {row.suffix for row in self.layout.values()}


_LORA = layout(a=("lora_down", "rank kernel"), b=("lora_up", "out rank 1..."))
_LOHA = layout(
    b0=("hada_w1_a", "out rank"), a0=("hada_w1_b", "rank in"), b1=("hada_w2_a", "out rank"), a1=("hada_w2_b", "rank in")
)
_CORE = layout(
    a=("lora_down", "rank channels 1..."),
    core=("lora_mid", "core_rank rank window"),
    b=("lora_up", "out core_rank 1..."),
)
FORMS = (
    Form(LoRA, _LORA),
    Form(DoRA, {**_LORA, **layout(m=("dora_scale", "out 1 1..."))}),
    Form(DoRA, {**_LORA, **layout(m=("lora_magnitude_vector", "out"))}),
    Form(DoRA, {**_LORA, **layout(m=("lora_magnitude_vector", "1 out 1..."))}),
    Form(LoCon, _CORE),
    Form(LoHa, _LOHA),
    *(Form(LoKr, layout) for layout in kronecker.LAYOUTS),
    Form(Full, layout(d=("diff", "out kernel"))),
)
# Differences of biases and of the parameters of norms, by the parameter's name in the module.
PARAMETERS = {"diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


def contents(tensors: Arrays) -> tuple[ModuleContent | None, dict[str, np.ndarray]]:
    """What a module's tensors are.

    Arguments:
        tensors: those of one module, by what they are.

    Returns:
        the content for its weight, if there is one, and the differences of its parameters by their names in the module.

    Raises:
        ValueError: if jlora does not read such tensors, a tensor is missing or left over, or they do not fit.
    """
    refused = next((name for name in tensors if name in REFUSED), None)
    if refused is not None:
        raise ValueError(f"it has the tensor {refused}: {REFUSED[refused]}, which jlora does not read.")
    parameters = {PARAMETERS[name]: tensors[name] for name in PARAMETERS if name in tensors}
    of_weight = {name: tensor for name, tensor in tensors.items() if name not in PARAMETERS}
    if not of_weight:
        return None, parameters
    alpha = _alpha(of_weight.pop("alpha", None))
    form = _form_of(of_weight)
    arrays = {factor: of_weight[row.suffix] for factor, row in form.layout.items()}
    _check_arrays(arrays)
    if form.method is LoKr:
        return kronecker.content(form.layout, arrays, alpha), parameters
    method = Full() if form.method is Full else _with_rank(form.method, arrays, alpha)
    return ModuleContent(method, form.layout, arrays), parameters


def _with_rank(method: type[Method], arrays: Arrays, alpha: float | None) -> Method:
    rank = len(arrays["a0"] if method is LoHa else arrays["a"])
    values = {"rank": rank, "alpha": float(rank) if alpha is None else alpha}
    return method(**values)  # pyright: ignore[reportCallIssue]


def _alpha(tensor: np.ndarray | None) -> float | None:
    """The number in the tensor alpha; None without one, and then the scale is 1."""
    if tensor is None:
        return None
    if tensor.size != 1 or not math.isfinite(alpha := float(tensor.reshape(-1)[0])) or alpha == 0:
        raise ValueError(f"its alpha is {np.asarray(tensor).tolist()}, and it must be one finite number other than 0.")
    return alpha


def _form_of(tensors: Arrays) -> Form:
    names = set(tensors)
    alike = [form for form in FORMS if form.tensors == names]
    if len(alike) > 1:  # of DoRA, whose magnitude has more axes for a convolution
        ndim = tensors["lora_magnitude_vector"].ndim
        alike = [form for form in alike if (form.layout["m"].axes == "out") == (ndim == 1)]
    if alike:
        return alike[0]
    if "dora_scale" in names and "lora_down" not in names:
        raise ValueError(
            f"it has dora_scale beside {sorted(names - {'dora_scale'})}, and jlora has DoRA of LoRA alone."
        )
    if "hada_t1" in names or "hada_t2" in names:
        raise ValueError("it has hada_t1, the Tucker form of LoHa, which jlora does not read.")
    nearest = min(FORMS, key=lambda form: len(form.tensors ^ names))
    missing, surplus = sorted(nearest.tensors - names), sorted(names - nearest.tensors)
    raise ValueError(f"{nearest.method.__name__}: missing {missing}, left over {surplus}.")


def _check_arrays(arrays: Arrays) -> None:
    integers = {name: array.dtype.name for name, array in arrays.items() if array.dtype.kind in "iub"}
    if integers:
        raise ValueError(f"its factors have the dtypes {integers}, and factors are floating-point numbers.")
    flat = {name: array.shape for name, array in arrays.items() if name != "m" and array.ndim < 2}
    if flat:
        raise ValueError(f"its factors have the shapes {flat}, and each must have two axes or more.")
    m, b = arrays.get("m"), arrays.get("b")
    if m is not None and b is not None and m.size != len(b):
        raise ValueError(
            f"its magnitudes have the shape {m.shape}, and jlora's DoRA has one for each of the {len(b)} outputs. "
            "Train it with wd_on_out=True, or merge it with LyCORIS."
        )
