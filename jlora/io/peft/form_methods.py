"""The methods of PEFT's configurations whose files have forms of their own: see `forms.py`."""

from collections.abc import Callable
from typing import Any

from jlora.io.peft.config import Config
from jlora.methods import PEANuT, SuperTuning, TinyLoRA, UniLoRA, VBLoRA
from jlora.methods._base import Method


def method_of_form(config: Config, rank: int, number: Callable[[Any, str], float]) -> Method:
    """The method of a configuration.

    Arguments:
        config: the configuration.
        rank: its rank.
        number: checks that a value is a number, and converts it.
    """
    match config["peft_type"]:
        case "TINYLORA":
            return TinyLoRA(rank, config["u"], dropout=number(config.get("tinylora_dropout", 0.0), "tinylora_dropout"))
        case "VBLORA":
            dropout = number(config.get("vblora_dropout", 0.0), "vblora_dropout")
            return VBLoRA(rank, config["num_vectors"], config["vector_length"], config.get("topk", 2), dropout=dropout)
        case "UNILORA":
            dropout = number(config.get("unilora_dropout", 0.0), "unilora_dropout")
            return UniLoRA(rank, config["theta_d_length"], None, dropout=dropout)
        case _:
            scaling = number(config.get("scaling", 1.0), "scaling")
            return PEANuT(rank, config.get("depth", 0), config.get("act_fn", "relu"), scaling)


def super_tuning(config: Config, number: Callable[[Any, str], float]) -> SuperTuning:
    """The method of a configuration of Super-Tuning, with a LoRA beside if it has a rank.

    Arguments:
        config, number: as for `method_of_form`.
    """
    rank, alpha = config.get("r"), config.get("lora_alpha")
    alpha = 2.0 * rank if rank and alpha is None else alpha
    sparsity = number(config["sparsity"], "sparsity")
    return SuperTuning(sparsity, config.get("select_top", True), rank, None if rank is None else number(alpha, "alpha"))
