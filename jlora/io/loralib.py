"""Adapters that were trained with the original library, loralib."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jlora._trace.sites import Sites
from jlora.io.torch.factor_layout import Piece, assemble
from jlora.io.torch.module_names import Names, Place, Weight, misfit, places
from jlora.methods import LoRA
from jlora.methods._base import Adapter


def load(
    state: Mapping[str, Any],
    sites: Sites,
    names: Names,
    *,
    alpha: float = 1.0,
    enable: tuple[bool, ...] | None = None,
) -> Adapter:
    """Reads an adapter from what `loralib.lora_state_dict` gave.

    The state says neither what alpha was nor which groups of a MergedLinear are adapted. A convolution of kernel k x k
    becomes a LoRA of rank r k^2: loralib multiplies (out k, r k) with (r k, in k) and reads that as a kernel.

    Arguments:
        state: arrays by name, `<module>.lora_A` and `<module>.lora_B`, and nothing else.
        sites: from `jlora.trace`.
        names: as for `jlora.peft.load`; a weight that is query, key and value in one is named by its one module.
        alpha: loralib's `lora_alpha`, the same for all layers.
        enable: loralib's `enable_lora`, the same for every MergedLinear.

    Returns:
        the adapter.

    Raises:
        ValueError: for a name that is no adapter's, a module without a weight, and a shape that does not fit.

    Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685.
    """
    strange = [key for key in state if not key.endswith((".lora_A", ".lora_B"))]
    if strange:
        raise ValueError(f"These are no tensors of an adapter: {strange}. Pass loralib.lora_state_dict(model).")
    found = places(names, {path: Weight(site.shape, site.roles) for path, site in sites.items()})
    modules = {key.rpartition(".")[0]: None for key in state}
    owners = {name: (place, index) for place in found.values() for index, (name, *_) in place.modules.items()}
    lost = {name: owners for name in modules if name not in owners}
    if lost:
        raise misfit("These in the state have no weight in the program:", lost, names, sites)
    pieces: dict[str, dict[tuple[int, ...], Piece]] = {}
    for name in modules:
        missing = [f"{name}.lora_{x}" for x in "AB" if f"{name}.lora_{x}" not in state]
        if missing:
            raise ValueError(f"The state has no {missing[0]}.")
        place, index = owners[name]
        if place.pieces > 1 or place.module.part is not None:
            raise ValueError(f"{name} is not the one module of {place.path}: loralib's layers are read one for one.")
        a, b = (np.asarray(state[f"{name}.lora_{x}"]) for x in "AB")
        piece = _piece(name, a, b, place, alpha, enable)
        pieces.setdefault(place.path, {})[index] = piece
    out = {path: assemble(by_index, found[path]) for path, by_index in pieces.items()}
    return {
        path: dataclasses.replace(out[path], factors={n: jnp.asarray(a) for n, a in out[path].factors.items()})
        for path in sites
        if path in out
    }


def _piece(
    name: str, a: np.ndarray, b: np.ndarray, place: Place, alpha: float, enable: tuple[bool, ...] | None
) -> Piece:
    """A module's two matrices as a LoRA, in the layout that `assemble` takes."""
    n_in, n_out = place.count("in"), place.count("out")
    misfit = ValueError(f"{name} has lora_A {a.shape} and lora_B {b.shape}, and {place.path} is {place.weight.shape}.")
    if a.ndim != 2 or b.ndim != 2 or not place.is_matrix:
        raise misfit
    if place.module.kind == "conv":
        size, channels = place.kernel[-1], place.kernel[0]
        if set(place.kernel[1:]) != {size} or len(place.kernel) != 3 or b.shape != (n_out * size, len(a)):
            raise misfit
        if a.shape != (len(a) // size * size, channels * size):
            raise misfit
        high = b.reshape(n_out, size, len(a)).transpose(1, 2, 0).reshape(size * len(a), n_out)
        wide = np.kron(np.eye(size, dtype=a.dtype), a.T)
        rank = len(high)  # loralib divides alpha by r, which is rank / size^2
        return Piece(LoRA(rank, float(alpha) * size**2), 1.0, {"a": wide, "b": high})
    if len(a) == b.shape[1]:
        if a.shape[1] != n_in or len(b) != n_out:
            raise misfit
        return Piece(LoRA(len(a), float(alpha)), 1.0, {"a": a.T, "b": b.T})
    rank, groups = b.shape[1], len(enable or ())
    if not enable or rank * sum(enable) != len(a) or a.shape[1] != n_in or len(b) * groups != n_out * sum(enable):
        raise ValueError(f"{misfit} A MergedLinear needs enable=, and is given {enable}.")
    method = LoRA(rank, float(alpha), groups=groups, enable=tuple(enable), group_axis=place.axes("out")[0])
    down = a.reshape(sum(enable), rank, n_in).transpose(2, 0, 1)
    return Piece(method, 1.0, {"a": down, "b": b.reshape(sum(enable), -1, rank).transpose(0, 2, 1)})
