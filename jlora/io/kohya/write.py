"""From an adapter to the tensors of kohya, LyCORIS and diffusers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import numpy as np

from jlora._adapter.to_lora import to_lora
from jlora.io.kohya import forms
from jlora.io.kohya.keys import TENSORS, Form, key_of, names_by_key
from jlora.io.peft.deltas import BaseParams, to_absolute
from jlora.io.peft.layouts import Layout, flat_names
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.module_parts import locate_adapter, module_entries
from jlora.io.peft.tensors import to_file
from jlora.io.torch.factor_layout import ModuleFactors
from jlora.io.torch.join_modules import times, total_scale
from jlora.io.torch.module_names import Kind, Names
from jlora.methods import DoRA, Full, GroupedLoRA, LoCon, LoHa, LoKr, LoRA
from jlora.methods._base import Adapter, Method, Update

# The methods that each form holds; all others become the equal LoRA.
_METHODS: dict[Form, tuple[type[Method], ...]] = {
    "kohya": (LoRA, DoRA, GroupedLoRA, LoCon, LoHa, LoKr, Full),
    "diffusers": (LoRA, DoRA, GroupedLoRA, Full),
}
_KINDS = ("linear", "conv")
Tensors = dict[str, np.ndarray]


class File(NamedTuple):
    """What is written: the tensors by key, and a sentence for each change of form."""

    tensors: Tensors
    notes: tuple[str, ...]


def file_of(adapter: Adapter, names: Names, params: Any, form: Form) -> File:
    """The tensors of an adapter.

    Arguments:
        adapter: the adapter.
        names: the map.
        params: the base parameters, or None.
        form: of the keys.

    Raises:
        ValueError: if the form cannot hold the adapter.
    """
    if form not in get_args(Form):
        raise ValueError(f"form is one of {', '.join(get_args(Form))}, not {form!r}.")
    if not adapter:
        raise ValueError("The adapter is empty: there is nothing to save.")
    base = BaseParams(params)
    locations = locate_adapter(adapter, names, base)
    notes: list[str] = []
    converted = {path: _converted(path, update, params, form, notes) for path, update in adapter.items()}
    entries = module_entries(_with_magnitudes(converted, base), locations)
    names_by_key(name for name, entry in entries.items() if entry.location.module.kind != "parameter")
    tensors: Tensors = {}
    for name, entry in entries.items():
        is_parameter = entry.location.module.kind == "parameter"
        written = _parameter(name, entry, entries) if is_parameter else _weight(name, entry, form, notes)
        module = name.rpartition(".")[0] if is_parameter else name
        key = key_of(module, form, entries)
        tensors |= {f"{key}.{_ending(tensor, form)}": array for tensor, array in written.items()}
    return File(tensors, tuple(notes))


def _converted(path: str, update: Update, params: Any, form: Form, notes: list[str]) -> Update:
    """The update by a method that the form holds; the equal LoRA if it holds another one."""
    method = update.method
    if isinstance(method, Full) and form == "diffusers":
        raise ValueError(f"{path} has Full, and a file of diffusers holds low rank alone: use form='kohya'.")
    has_window = max(update.axes.sizes("*window"), default=1) > 1
    is_held = isinstance(method, _METHODS[form]) and not method.offset
    if is_held and (has_window or not isinstance(method, LoCon)):  # without a window LyCORIS has no core
        return update
    lora, errors = to_lora({path: update}, params)
    way = "by its factors" if errors[path] == 0 else f"by SVD with an error of {errors[path]:.1e}"
    rank = getattr(lora[path].method, "rank", None)
    notes.append(f"{path}: {type(method).__name__} became a LoRA of rank {rank}, {way}.")
    return lora[path]


def _with_magnitudes(adapter: Adapter, base: BaseParams) -> Adapter:
    return {p: to_absolute(p, u, base) if isinstance(u.method, DoRA) else u for p, u in adapter.items()}


def _ending(tensor: str, form: Form) -> str:
    if tensor in TENSORS:
        return TENSORS[tensor][form == "diffusers" and len(TENSORS[tensor]) > 2]
    return f"{tensor}.weight" if tensor == "lora_mid" else tensor


def _parameter(name: str, entry: ModuleEntry, entries: Mapping[str, ModuleEntry]) -> Tensors:
    """The difference of a bias, or of a parameter of a norm.

    Raises:
        ValueError: if readers would pass it over: they look for one of the weight first.
    """
    module, _, parameter = name.rpartition(".")
    weight, norm_weight = entries.get(module), entries.get(f"{module}.weight")
    if not isinstance(entry.factors.method, Full) or parameter not in ("weight", "bias"):
        raise ValueError(f"{name} is a parameter with {type(entry.factors.method).__name__}: adapt the module instead.")
    if parameter == "bias" and norm_weight is None and (weight is None or not isinstance(weight.factors.method, Full)):
        raise ValueError(
            f"{name} is trained, and its weight is not trained in full: LyCORIS and kohya would pass the bias over. "
            "Adapt the weight by jlora.Full too, or merge the adapter."
        )
    tensor = "w_norm" if parameter == "weight" else "diff_b" if norm_weight is None else "b_norm"
    difference = entry.factors.arrays["d"]
    return {tensor: np.ascontiguousarray(difference * difference.dtype.type(entry.factors.scale)).reshape(-1)}


def _weight(name: str, entry: ModuleEntry, form: Form, notes: list[str]) -> Tensors:
    """The tensors of a layer.

    Raises:
        ValueError: if the form has no layout for the method.
    """
    location = entry.location
    if location.module.kind not in _KINDS:
        raise ValueError(
            f"{name} is of kind {location.module.kind}, and such files hold linear layers and convolutions: leave it "
            "out, or save the adapter by jlora.peft.save."
        )
    factors = _with_scale_in_factors(name, entry.factors, form, notes)
    layout = _layout(name, factors, form, location.module.kind)
    tensors = {
        row.suffix: to_file(factors.arrays[factor], factors.axes[factor], row.axes, location.kernel)
        for factor, row in layout.items()
    }
    if form == "kohya" and not isinstance(factors.method, Full):
        tensors["alpha"] = np.float32(_alpha(name, factors)) * np.ones((), np.float32)
    return tensors


def _layout(name: str, factors: ModuleFactors, form: Form, kind: Kind) -> Layout:
    """The layout for the factors of a layer."""
    suffix = "dora_scale" if form == "kohya" else "lora_magnitude_vector"
    of_convolution = kind == "conv" or form == "kohya"  # diffusers' vector has more axes for those
    for candidate in forms.FORMS:
        layout = candidate.layout
        if candidate.method is not type(factors.method) or layout.keys() != factors.axes.keys():
            continue
        if "m" in layout and (layout["m"].suffix != suffix or ("1..." in layout["m"].axes) != of_convolution):
            continue
        if all(set(flat_names(layout[f].axes)) == set(factors.axes[f]) for f in layout):
            return layout
    raise ValueError(f"{type(factors.method).__name__} of {name} has no form in such files that jlora knows.")


def _with_scale_in_factors(name: str, factors: ModuleFactors, form: Form, notes: list[str]) -> ModuleFactors:
    """The factors with the scale in one of them, if the form has no alpha for it."""
    method = factors.method
    match method:
        case LoRA() | DoRA() if form == "diffusers":
            factor, scale = "b", total_scale(factors)
        case LoKr() if factors.arrays.keys() == {"c", "d"}:
            factor, scale = "c", factors.scale
        case Full():
            factor, scale = "d", factors.scale
        case _:
            return factors
    if scale != 1:
        scaled = times(factors.arrays[factor], scale)
        factors = dataclasses.replace(factors, scale=1.0, arrays={**factors.arrays, factor: scaled})
        notes.append(
            f"{name}: the scale {scale:g} was multiplied into its factor {factor}, since the form has no alpha."
        )
    return factors


def _alpha(name: str, factors: ModuleFactors) -> float:
    """The numerator of the scale, the denominator being the rank."""
    method, scale = factors.method, factors.scale
    rank = getattr(method, "rank", None) or 1
    match method:
        case LoRA() | DoRA():
            alpha = total_scale(factors) * rank if method.rank_stabilized else (method.alpha or rank) * scale
        case LoHa() | LoKr() | LoCon():
            alpha = (method.alpha or rank) * scale
        case _:
            raise ValueError(f"{type(method).__name__} of {name} has no alpha.")
    if not alpha:
        raise ValueError(f"{name} has the scale 0, which readers of such files take for no scale: leave it out.")
    return alpha
