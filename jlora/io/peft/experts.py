"""Experts in PEFT's `target_parameters`: which of its two layouts a file has.

PEFT takes a parameter (experts, m, n) as (experts, in, out) up to release 0.18. From 0.19 on it knows that most modules
hold (experts, out, in), so A has the in axis of the layer in every module.
"""

import re
from collections.abc import Mapping

import numpy as np

from jlora.io.peft.config import Config
from jlora.io.peft.layouts import EARLIER_EXPERTS, Layout
from jlora.io.peft.tensors import Sizes

_FIRST_BY_LAYER = (0, 19)


def layout_of_experts(
    config: Config, name: str, layout: Layout, tensors: Mapping[str, np.ndarray], sizes: Sizes
) -> Layout:
    """The layout of a parameter's tensors.

    Arguments:
        config: the configuration.
        name: of the parameter.
        layout: that of releases from 0.19 on.
        tensors: by suffix.
        sizes: of the parameter.

    Raises:
        ValueError: if the in and the out size are equal, and an earlier release wrote the file.
    """
    n_in, n_out, a = sizes.axes["in"], sizes.axes.get("out"), tensors["lora_A.weight"]
    if n_out is None or _is_by_layer(config) or a.ndim != 2:
        return layout
    if n_in == n_out:
        raise ValueError(
            f"{name} has as many inputs as outputs, {n_in}, and PEFT {config.get('peft_version') or 'before 0.18'} "
            "stores its experts by the order of torch's axes, which the file does not tell. If torch's parameter is "
            '(experts, in, out), set peft_version to "0.19.0" in the file; else merge the adapter with that release.'
        )
    return EARLIER_EXPERTS if a.shape[1] == n_out else layout


def _is_by_layer(config: Config) -> bool:
    """Whether the file has the newer layout: PEFT says so since 0.18, and jlora writes no other."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version")))
    if version is None:
        return "loftq_config" not in config  # PEFT writes that into every file of LoRA, and jlora does not
    return (int(version[1]), int(version[2])) >= _FIRST_BY_LAYER
