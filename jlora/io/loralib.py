"""Adapters of the original library, loralib."""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jlora._trace.sites import Sites
from jlora.io.torch.factor_layout import ModuleFactors, flat_axes
from jlora.io.torch.join_modules import stack_modules
from jlora.io.torch.module_names import Names, check_inputs, no_match_error
from jlora.io.torch.pickled import load_state
from jlora.io.torch.weight_location import Index, Owners, Weight, WeightLocation, locate_weights, owners_of
from jlora.methods import GroupedLoRA, LoRA
from jlora.methods._base import Adapter

__all__ = ["load"]
__docformat__ = "google"


def load(
    state: Mapping[str, ArrayLike] | str | os.PathLike[str],
    sites: Sites,
    names: Names,
    *,
    alpha: float = 1.0,
    enable: Sequence[bool] | None = None,
) -> Adapter:
    """Reads an adapter from the result of `loralib.lora_state_dict`.

        adapter = jlora.loralib.load("lora.pt", sites, {"layers/{i}/query/kernel": "h.{i}.query"}, alpha=16)

    The state records neither alpha nor which groups of a MergedLinear are adapted. A convolution with a k x k kernel
    becomes a LoRA of rank r k^2: loralib multiplies (out k, r k) by (r k, in k) and reads the product as a kernel.

    Arguments:
        state: the file that `torch.save` wrote, which is read without torch and without running anything; or arrays by
            name, `<module>.lora_A` and `<module>.lora_B`, and nothing else.
        sites: from `jlora.trace`.
        names: as for `jlora.peft.load`. A weight with query, key and value in one is named by its one module.
        alpha: loralib's `lora_alpha`, the same for all layers.
        enable: loralib's `enable_lora`, the same for every MergedLinear.

    Returns:
        the adapter.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, a name is not that of an adapter's tensor, a module has no weight in the
            program, or a shape does not fit.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """
    check_inputs(sites, names)
    state = state if isinstance(state, Mapping) else load_state(state)
    locations = locate_weights(names, {path: Weight(site.shape, site.roles) for path, site in sites.items()})
    owners = owners_of(locations)
    by_path: dict[str, dict[Index, ModuleFactors]] = collections.defaultdict(dict)
    for name, (a, b) in _module_pairs(state, owners, names, sites).items():
        location, index, _ = owners[name][0]
        if location.num_joined > 1 or location.module.part is not None:
            raise ValueError(
                f"{name} is not the one module of {location.path}: loralib keeps each weight in one module, so name it "
                "alone, without a part."
            )
        by_path[location.path][index] = _factors(name, a, b, location, alpha, tuple(enable or ()))
    adapter = {}
    for path in sites:
        if path in by_path:
            update = stack_modules(by_path[path], locations[path])
            adapter[path] = dataclasses.replace(update, factors=jax.tree.map(jnp.asarray, update.factors))
    return adapter


def _module_pairs(
    state: Mapping[str, ArrayLike], owners: Owners, names: Names, sites: Sites
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B of every module.

    Raises:
        ValueError: if the state is empty, has other tensors, lacks one of the two, or has a module without a weight.
    """
    others = [key for key in state if not key.endswith((".lora_A", ".lora_B"))]
    if others:
        raise ValueError(f"These are no tensors of an adapter: {others}. Pass loralib.lora_state_dict(model).")
    if not state:
        raise ValueError("The state has no tensors. Pass loralib.lora_state_dict(model).")
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in state))
    unplaced = {name: owners for name in modules if name not in owners}
    if unplaced:
        raise no_match_error("These in the state have no weight in the program:", unplaced, names, sites)
    return {name: (_tensor(state, f"{name}.lora_A"), _tensor(state, f"{name}.lora_B")) for name in modules}


def _tensor(state: Mapping[str, ArrayLike], key: str) -> np.ndarray:
    if key not in state:
        raise ValueError(f"The state has no {key}. Pass the whole of loralib.lora_state_dict(model).")
    return np.asarray(state[key])


def _factors(
    name: str, a: np.ndarray, b: np.ndarray, location: WeightLocation, alpha: float, enable: tuple[bool, ...]
) -> ModuleFactors:
    """The two matrices of a module as a LoRA."""
    n_in, n_out = location.count("in"), location.count("out")
    factors = None
    if a.ndim == b.ndim == 2 and location.is_matrix:
        if location.module.kind == "conv":
            factors = _convolution(a, b, location, alpha)
        elif a.shape == (b.shape[1], n_in) and len(b) == n_out:
            method = LoRA(len(a), float(alpha))
            factors = ModuleFactors(method, 1.0, {"a": a.T, "b": b.T}, flat_axes(method, location))
        elif a.shape == (sum(enable) * b.shape[1], n_in) and len(b) * len(enable) == n_out * sum(enable):
            factors = _merged_linear(a, b, location, alpha, enable)
    if factors is None:
        raise ValueError(
            f"{name} has lora_A {a.shape} and lora_B {b.shape}, which do not fit {location.path} "
            f"{location.weight.shape}. A MergedLinear needs enable=, its enable_lora; given: {enable or None}."
        )
    return factors


def _convolution(a: np.ndarray, b: np.ndarray, location: WeightLocation, alpha: float) -> ModuleFactors | None:
    """A convolution's matrices (r k, in k) and (out k, r k) as a LoRA of rank r k^2; None if the shapes do not fit."""
    channels, *window = location.kernel
    n_out, high = location.count("out"), len(a)
    size = window[0] if window else 0
    if window != [size, size] or high % size or a.shape != (high, channels * size) or b.shape != (n_out * size, high):
        return None
    wide = np.kron(np.eye(size, dtype=a.dtype), a.T)
    out = b.reshape(n_out, size, high).transpose(1, 2, 0).reshape(size * high, n_out)
    method = LoRA(size * high, float(alpha) * size**2)  # loralib divides alpha by r = rank / k^2
    return ModuleFactors(method, 1.0, {"a": wide, "b": out}, flat_axes(method, location))


def _merged_linear(
    a: np.ndarray, b: np.ndarray, location: WeightLocation, alpha: float, enable: tuple[bool, ...]
) -> ModuleFactors:
    """A MergedLinear's matrices (enabled r, in) and (enabled out / groups, r)."""
    (count, n_in), rank = (sum(enable), a.shape[1]), b.shape[1]
    axis = location.axes("out")[0]
    method = GroupedLoRA(rank, float(alpha), groups=len(enable), enable=enable, group_axis=axis)
    arrays = {
        "a": a.reshape(count, rank, n_in).transpose(2, 0, 1),
        "b": b.reshape(count, -1, rank).transpose(0, 2, 1),
    }
    return ModuleFactors(method, 1.0, arrays, flat_axes(method, location))
