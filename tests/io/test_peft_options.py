"""Every option of PEFT's configurations: with a value other than its default it is read, or refused by name.

`golden/peft_options.json` has all types and options of PEFT 0.21.2 with their defaults, by `golden/peft_options.py`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import jlora

GOLDEN = Path(__file__).parents[1] / "golden" / "peft_options.json"
OPTIONS: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())

# Options that say where a file comes from, or that act before or during training alone.
WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "init_weights"),
    *("init_ia3_weights", "rank_dropout", "rank_dropout_scale", "module_dropout", "runtime_config", "megatron_core"),
    *("init_v_bound", "init_logits_std", "init_vector_bank_bound", "init_theta_d_bound"),
    *("progressbar", "runtime_offload_base_weight"),
    *("qalora_group_size", "fan_in_fan_out"),  # of QALoRA, which is refused; a fact about torch's layer
}
MODULES = {"peft_type", "target_modules", "exclude_modules", "modules_to_save"}
LAYERS = {"layers_to_transform", "layers_pattern"}
PATTERNS = {"r", "rank_pattern", "alpha_pattern"}
# Options that are read: other tests show what a file with them computes.
READ = {
    "LORA": {
        *(MODULES | LAYERS | PATTERNS),
        *("lora_alpha", "use_rslora", "use_dora", "lora_dropout", "bias", "lora_bias", "init_lora_weights"),
        *("trainable_token_indices", "target_parameters", "ensure_weight_tying", "monteclora_config"),
        *("use_bdlora", "use_qalora", "kasa_config"),
    },
    "ADALORA": {
        *(MODULES | LAYERS | {"lora_alpha", "lora_dropout", "init_r", "rank_pattern", "bias"}),
        *("trainable_token_indices", "ensure_weight_tying"),
        # These change nothing in PEFT's AdaLoRA after training.
        *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
        *("r", "alpha_pattern", "use_rslora", "lora_bias", "init_lora_weights"),
    },
    "LOHA": MODULES | LAYERS | PATTERNS | {"alpha", "use_effective_conv2d"},
    "LOKR": MODULES | LAYERS | PATTERNS | {"alpha", "use_effective_conv2d", "decompose_both", "decompose_factor"},
    "VERA": MODULES | LAYERS | {"r", "bias", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"},
    "IA3": MODULES | {"feedforward_modules"},
    "TRAINABLE_TOKENS": {"peft_type", "target_modules", "token_indices"},
    "TINYLORA": MODULES
    | LAYERS
    | {"r", "u", "bias", "weight_tying", "projection_seed", "save_projection", "tinylora_dropout"},
    "VBLORA": MODULES
    | LAYERS
    | {"r", "bias", "num_vectors", "vector_length", "topk", "vblora_dropout", "save_only_topk_weights"},
    "UNILORA": MODULES | LAYERS | {"r", "bias", "theta_d_length", "proj_seed", "unilora_dropout", "save_indices"},
    "PVERA": MODULES
    | LAYERS
    | {"r", "bias", "projection_prng_key", "save_projection", "pvera_dropout", "d_initial"}
    | {"sample_at_inference", "generator_seed"},
    "SUPERTUNING": MODULES | {"sparsity", "select_top", "r", "lora_alpha", "lora_dropout", "save_precomputed_indices"},
    "OFT": MODULES
    | LAYERS
    | {"r", "oft_block_size", "bias", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"},
    "BOFT": MODULES | LAYERS | {"bias", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout"},
    "HRA": MODULES | LAYERS | {"r", "apply_GS", "bias"},
    "ROAD": MODULES | {"variant", "group_size"},
    "DEFT": MODULES | LAYERS | {"r", "alpha", "decomposition_method", "para", "init_scale", "deft_dropout", "bias"},
    "GRALORA": MODULES | LAYERS | {"r", "alpha", "gralora_k", "gralora_dropout", "bias"},
    "OSF": MODULES | LAYERS | {"effective_rank", "rank_pattern"},
    "C3A": MODULES | LAYERS | {"bias", "block_size", "block_size_pattern"},
    "FOURIERFT": MODULES | LAYERS | {"bias", "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed"},
    "WAVEFT": MODULES
    | LAYERS
    | {"bias", "n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed"}
    | {"proportional_parameters", "wavelet_family", "use_idwt"},
    "SHIRA": MODULES | {"r", "mask_type", "random_seed"},
    "FROD": MODULES
    | LAYERS
    | {"bias", "sparse_rate", "regularization_alpha", "frod_dropout", "projection_prng_key", "save_projection"},
    "HIRA": MODULES | LAYERS | {"r", "rank_pattern", "hira_dropout"},
    "DELORA": MODULES | LAYERS | {"r", "rank_pattern", "bias", "delora_lambda", "lambda_pattern"},
    "MISS": MODULES | LAYERS | {"r", "bias", "mini_r", "miss_dropout"},  # and init_weights, which other tests show
    "GLORA": MODULES | {"r", "bias", "config_A_B", "config_C", "config_D_E"},
    "RANDLORA": MODULES
    | LAYERS
    | {"r", "bias", "randlora_alpha", "randlora_dropout", "projection_prng_key", "save_projection"}
    | {"sparse", "very_sparse"},
    "LN_TUNING": MODULES,
    "BEFT": MODULES,
    "PEANUT": MODULES | LAYERS | {"r", "depth", "act_fn", "scaling"},
}
REQUIRED = {
    "randlora_alpha": 3,
    "r": 2,
    "lora_alpha": 3,
    "alpha": 3,
    "init_r": 3,
    "target_modules": ["q"],
    "feedforward_modules": ["q"],
}
# Values that PEFT accepts; of any other option one is made from the default.
VALUES: dict[str, Any] = {
    "exclude_modules": ["k"],
    "modules_to_save": ["head"],
    "layers_to_transform": [0],
    "layers_pattern": ["layer"],
    "rank_pattern": {"q": 4},
    "alpha_pattern": {"q": 4},
    "bias": "all",
    "init_lora_weights": "gaussian",
    "trainable_token_indices": [1],
    "token_indices": [1],
    "monteclora_config": {"num_samples": 2},
    "target_parameters": ["q.weight"],
    "target_modules": ["k"],
    "feedforward_modules": ["k"],
}


def changed(name: str, default: Any) -> Any:
    """A value of an option other than its default."""
    if name in VALUES:
        return VALUES[name]
    match default:
        case bool():
            return not default
        case int() | float():
            return default + 1
        case dict():
            return {**default, "something": 1}
    return f"{default}, and more" if isinstance(default, str) else 7


def refusal(folder: Path, config: dict[str, Any]) -> str:
    """What is said of a file with a configuration; empty if it is read. There are no tensors."""
    (folder / "adapter_config.json").write_text(json.dumps(config))
    try:
        jlora.peft.load(folder, jlora.trace(lambda params: params, {}), {})
    except FileNotFoundError:
        return ""
    except ValueError as error:
        return str(error)
    raise AssertionError("An adapter without tensors was read.")


@pytest.mark.parametrize("peft_type", READ)
def test_an_option_is_read_or_refused_by_name(peft_type, tmp_path):
    defaults = OPTIONS[peft_type] | {name: value for name, value in REQUIRED.items() if name in OPTIONS[peft_type]}
    defaults |= {"peft_type": peft_type}
    assert refusal(tmp_path, defaults) == ""
    accepted = {"peft_type"}
    for name, default in OPTIONS[peft_type].items():
        if name != "peft_type":
            message = refusal(tmp_path, defaults | {name: changed(name, default)})
            assert name in message or not message, (name, message)
            accepted |= set() if message else {name}
    assert accepted - WITHOUT_EFFECT == READ[peft_type] & set(OPTIONS[peft_type])
    message = refusal(tmp_path, defaults | {"an_option_of_tomorrow": {"a": 1}})
    assert "an_option_of_tomorrow" in message


def test_every_other_type_is_refused_by_name(tmp_path):
    for peft_type in set(OPTIONS) - set(READ):
        assert f"peft_type '{peft_type}'" in refusal(tmp_path, OPTIONS[peft_type] | {"peft_type": peft_type})


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("corda", "start=folder"),
        ("lora_ga", "start=folder"),
        ("pissa_niter_16", "start=folder"),
        ("loftq", "the base that LoftQ has quantised"),
        ("a_start_of_tomorrow", "jlora does not know"),
        *((start, "") for start in (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa", "olora")),
    ],
)
def test_starts(start, message, tmp_path):
    required = {"r": 2, "lora_alpha": 3, "target_modules": ["q"]}
    config = OPTIONS["LORA"] | required | {"peft_type": "LORA", "init_lora_weights": start}
    actual = refusal(tmp_path, config)
    assert message in actual
    assert bool(message) == bool(actual)


if importlib.util.find_spec("peft"):

    def test_live():
        """The golden file holds what its script makes."""
        from tests.golden import peft_options

        assert peft_options.records() == OPTIONS
