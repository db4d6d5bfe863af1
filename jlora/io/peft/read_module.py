"""The factors of one adapted module from its tensors in a file."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.absent import absent_arrays, check_empty, has_arrays_from_base, stored_axes
from jlora.io.peft.changed_base import FROM_BASE, minus_start, start_of
from jlora.io.peft.config import Config
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.experts import layout_of_experts
from jlora.io.peft.form_methods import osf_of_file, with_entries_of_peft
from jlora.io.peft.forms import shared_name
from jlora.io.peft.frod import with_modules
from jlora.io.peft.from_base import PURPOSE, arrays_from_base
from jlora.io.peft.full_weights import base_matrix
from jlora.io.peft.layouts import layout_of
from jlora.io.peft.lokr import SCRAMBLED, is_scrambled, with_usual_split
from jlora.io.peft.lora_variants import with_pooling_of_peft
from jlora.io.peft.maps import is_map, method_and_tensors
from jlora.io.peft.method_fields import is_unscaled, method_of
from jlora.io.peft.plain_forms import parameter_of, plain
from jlora.io.peft.products import read_delora, with_matrices
from jlora.io.peft.pvera import read_pvera
from jlora.io.peft.stated_sizes import check_stated_sizes
from jlora.io.peft.structured import check_entries
from jlora.io.peft.tensors import Sizes, Tensors, from_file, sizes_of
from jlora.io.peft.vera import read_vera
from jlora.io.torch.factor_layout import ModuleFactors, flat_axes, own_sizes
from jlora.io.torch.weight_location import Owners, WeightLocation
from jlora.methods import OSF, DeLoRA, FRoD, LoKr, PVeRA, QALoRA, RandLoRA, SHiRA, SuperTuning, VeRA
from jlora.methods._base import Method

_LAYERS = ("linear", "conv1d")


@dataclasses.dataclass(frozen=True)
class ModuleReader:
    """What the factors of a module are read with.

    Arguments:
        config: the configuration.
        owners: of all modules.
        tensors: all of the file.
        base: the base parameters.
    """

    config: Config
    owners: Owners
    tensors: Mapping[str, np.ndarray]
    base: BaseParams

    def read(self, name: str, by_suffix: Tensors, before: Tensors | None = None) -> ModuleFactors | None:
        """The factors of a module; None if its rank is 0.

        Arguments:
            name: of the module.
            by_suffix: its tensors.
            before: those before training, if they are in a file of their own.

        Raises:
            ValueError: if the tensors do not fit the module, or the base is needed and missing.
        """
        factors = self._factors(name, by_suffix)
        if factors is None:
            return None
        start = self._start(name, factors) if before is None else self._factors(name, before)
        return factors if start is None else minus_start(factors, start)

    def _factors(self, name: str, by_suffix: Tensors) -> ModuleFactors | None:
        location = self.owners[name][0].location
        method, tensors = self._method(name, location, by_suffix)
        check_stated_sizes(self.config, name, location.path, by_suffix, self._sizes(name))
        if not location.is_matrix:
            raise ValueError(f"The file adapts {name}, and {location.path} {location.weight.shape} is not a matrix.")
        if method is None:
            check_empty(self.config["peft_type"], name, tensors)
            return None
        by_suffix = plain(self.config, name, tensors, location.module.kind, location.kernel)
        axes, kind = flat_axes(method, location) | stored_axes(method), location.module.kind
        own = {factor: names for factor, names in axes.items() if factor not in absent_arrays(method)}
        layout = layout_of(method, kind, own, name)
        suffixes = {row.suffix for row in layout.values()}
        if suffixes != set(by_suffix):
            raise ValueError(
                f"{name}, {type(method).__name__} of {kind}: missing {sorted(suffixes - set(by_suffix))}, left over "
                f"{sorted(set(by_suffix) - suffixes)}."
            )
        sizes = sizes_of(self.owners[name]).with_axes(own_sizes(method, location))
        if kind == "parameter":
            layout = layout_of_experts(self.config, name, layout, by_suffix, sizes)
        arrays = {
            factor: from_file(by_suffix[row.suffix], axes[factor], row.axes, sizes, f"{name}.{row.suffix}")
            for factor, row in layout.items()
        }
        arrays |= {factor: self.tensors[shared_name(factor)] for factor in method.shared_arrays}
        if has_arrays_from_base(method):
            arrays |= arrays_from_base(method, base_matrix(self.owners[name], self.base, PURPOSE), arrays)
        return self._finished(name, ModuleFactors(method, 1.0, arrays, axes), sizes)

    def _method(self, name: str, location: WeightLocation, by_suffix: Tensors) -> tuple[Method | None, Tensors]:
        """The method of a module, with the hyper-parameters that its tensors show, and the tensors."""
        if is_map(self.config):
            return method_and_tensors(self.config, name, by_suffix, self._sizes(name))
        method = method_of(self.config, parameter_of(self.config, name))
        if isinstance(method, RandLoRA):
            method = with_matrices(method, self.tensors)
        if isinstance(method, FRoD):
            method = with_modules(method, name, self.tensors)
        if isinstance(method, SuperTuning) and location.is_matrix:
            method = with_entries_of_peft(method, location.count("in") * location.count("out"))
        if isinstance(method, LoKr) and location.is_matrix:
            method = with_usual_split(method, location)
        if isinstance(method, OSF):
            method = osf_of_file(by_suffix)
        if isinstance(method, LoKr) and is_scrambled(location.kernel, "lokr_w2" in by_suffix):
            raise ValueError(f"{name}: {SCRAMBLED}")
        return method, by_suffix

    def _sizes(self, name: str) -> dict[str, int]:
        """The in and the out size of a module; no out size if its part of the weight is not known."""
        owners, sizes = self.owners[name], dict(sizes_of(self.owners[name]).axes)
        location = owners[0].location
        if location.num_joined > 1 and (location.sizes_joined or location.count("out") % location.num_joined == 0):
            sizes["out"] = location.out_sizes[owners[0].position]
        return sizes

    def _finished(self, name: str, factors: ModuleFactors, sizes: Sizes) -> ModuleFactors:
        """The factors with what PEFT leaves out or computes in another way."""
        method, arrays = factors.method, factors.arrays
        if isinstance(method, SHiRA):
            check_entries(name, arrays["place"], sizes.axes)
        if isinstance(method, DeLoRA):
            return read_delora(factors, self.owners[name], self.base)
        if isinstance(method, PVeRA):
            return read_pvera(factors, sizes.axes["in"], self.tensors)
        if isinstance(method, QALoRA):
            return with_pooling_of_peft(factors, sizes.axes["in"])
        if isinstance(method, VeRA):
            return read_vera(name, factors, sizes.axes["in"], arrays["b"].shape[0], self.tensors)
        if isinstance(method, LoKr) and is_unscaled(factors):
            return dataclasses.replace(factors, scale=(method.alpha or 0) / (method.rank or 1))
        return factors

    def _start(self, name: str, factors: ModuleFactors) -> ModuleFactors | None:
        """The factors before training, from the base; None if the start of the adapter left the base as it was.

        PEFT changes layers alone, and neither embeddings nor convolutions.
        """
        start, kind = str(self.config.get("init_lora_weights")).lower(), self.owners[name][0].location.module.kind
        is_parameter = parameter_of(self.config, name) != name
        if self.config["peft_type"] != "LORA" or start not in FROM_BASE or not (is_parameter or kind in _LAYERS):
            return None
        if start == "olora" and kind == "conv1d" and not is_parameter:
            raise ValueError(f"{name} is a Conv1D, and PEFT's OLoRA start does not fit it: merge the adapter there.")
        purpose = f"init_lora_weights = {start!r} changes the base, and the adapter is relative to the changed one"
        weight = base_matrix(self.owners[name], self.base, purpose)
        return start_of(start, weight, factors, is_transposed=kind == "linear")
