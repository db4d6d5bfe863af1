"""Parameters that are trained in full, in PEFT's files: biases, modules to save, rows of embeddings."""

from collections.abc import Mapping

import numpy as np

from jlora._adapter.change import change_of
from jlora.io.peft.config import PREFIX, Config
from jlora.io.peft.deltas import BaseParams
from jlora.io.peft.layouts import FactorInFile, layout_of
from jlora.io.peft.module_entry import ModuleEntry
from jlora.io.peft.targets import tokens_of
from jlora.io.peft.tensors import Tensors, from_file, module_tensors, sizes_of, to_file
from jlora.io.torch.factor_layout import FlatAxes, ModuleFactors, flat_axes
from jlora.io.torch.split_modules import split_modules
from jlora.io.torch.weight_location import ModuleOwner, WeightLocation
from jlora.methods import Full, Rows
from jlora.methods._base import Update

_ORIGINAL, _COPY = ".original_module.bias", ".modules_to_save.bias"


def is_unused_copy(key: str, tensors: Tensors) -> bool:
    """Whether a tensor is a copy of a bias that PEFT writes with `bias="all"`: unused, or what ".bias" holds too."""
    return key.endswith(_ORIGINAL) or (key.endswith(_COPY) and key.replace(_COPY, ".bias") in tensors)


def _layout(name: str, location: WeightLocation) -> tuple[FlatAxes, FactorInFile]:
    """The axes of a trained parameter here and in the file."""
    axes = flat_axes(Full(), location)
    return axes["d"], layout_of(Full(), location.module.kind, axes, name)["d"]


def _full(value: np.ndarray, axes: FlatAxes) -> ModuleFactors:
    return ModuleFactors(Full(), 1.0, {"d": value}, {"d": axes})


def read_full(name: str, tensor: np.ndarray, owners: list[ModuleOwner]) -> ModuleFactors:
    """A trained parameter, its value and not yet the difference from the base.

    Raises:
        ValueError: if PEFT has no such parameter, or its shape does not fit.
    """
    axes, in_file = _layout(name, owners[0].location)
    return _full(from_file(tensor, axes, in_file.axes, sizes_of(owners), name), axes)


def untrained(name: str, owners: list[ModuleOwner], base: BaseParams) -> ModuleFactors:
    """The value of the base as that of a trained parameter: for a layer of a stack that the file does not train.

    Raises:
        ValueError: if the base is missing.
    """
    purpose = "the file trains some layers of a stack, and jlora a parameter without an axis of layers as a whole"
    return _full(_base_value(owners[0], base, purpose), _layout(name, owners[0].location)[0])


def read_token_rows(
    name: str, tensor: np.ndarray, config: Config, owners: list[ModuleOwner], base: BaseParams
) -> ModuleFactors:
    """A weight with its trained rows: the value of the base with some rows of torch's weight replaced.

    PEFT counts rows along the first axis of torch's weight: the tokens of an embedding (tokens, features), and those of
    an output head, a linear layer with (out, in).

    Arguments:
        name: of the module.
        tensor: the rows.
        config: which rows they are.
        owners: the weight.
        base: the base parameters.

    Raises:
        ValueError: if the rows do not fit the weight, or the base is missing.
    """
    axes, in_file = _layout(name, owners[0].location)
    kernel = owners[0].location.kernel
    value = _base_value(owners[0], base, "the file holds trained rows, and jlora's adapter their difference from it")
    weight, tokens = to_file(value, axes, in_file.axes, kernel).copy(), tokens_of(config, name)
    are_rows = tensor.shape == (len(tokens), *weight.shape[1:])
    if not tokens or not are_rows or not 0 <= min(tokens) <= max(tokens) < len(weight):
        raise ValueError(
            f"{name} has trained rows of shape {tensor.shape} for the tokens {tokens}; torch's weight there has shape "
            f"{weight.shape}."
        )
    weight[tokens] = tensor.astype(weight.dtype)
    return _full(from_file(weight, axes, in_file.axes, sizes_of(owners), name), axes)


def check_stored_base(name: str, tensor: np.ndarray, owners: list[ModuleOwner], base: BaseParams) -> None:
    """Raises unless the base weight in the file is that of `params`."""
    value = _base_value(owners[0], base, f"the file holds the base weight of {name} too")
    stored = read_full(name, tensor, owners).arrays["d"]
    if not np.array_equal(stored.astype(value.dtype), value):
        raise ValueError(
            f"The file holds the base weight of {name}, and it is another than {owners[0].location.path} in params: "
            "PEFT would replace it. Pass the base that the adapter was trained on, resized or trained as it was."
        )


def base_matrix(owners: list[ModuleOwner], base: BaseParams, purpose: str) -> np.ndarray:
    """The base weight of a module as a matrix (in, out); of several weights that are parts of it, all together.

    Arguments:
        owners: the weights.
        base: the base parameters.
        purpose: what it is needed for, for errors.
    """
    return np.concatenate([_base_value(owner, base, purpose) for owner in owners], axis=-1)


def _base_value(owner: ModuleOwner, base: BaseParams, purpose: str) -> np.ndarray:
    """The base weight of a module, flattened."""
    location = owner.location
    value = base.value(location.path, location.weight.shape, purpose)
    update = Update({"d": value}, Full(), location.weight.roles, location.weight.shape)
    factors = split_modules(update, location)[owner.stack_index][owner.position]
    assert factors is not None
    return factors.arrays["d"]


def _changed_rows(name: str, entry: ModuleEntry, base: BaseParams) -> tuple[list[int], np.ndarray]:
    """The rows of an embedding that are not those of the base, and their values."""
    location, factors = entry
    value = factors.arrays["d"]
    weight = base.value(location.path, location.weight.shape, f"{name} is saved as trained rows").reshape(value.shape)
    rows = np.flatnonzero((value != weight.astype(value.dtype)).any(1))
    return rows.tolist(), value[rows]


def only_tokens(embeddings: Mapping[str, ModuleEntry], base: BaseParams) -> tuple[Config, Tensors]:
    """The configuration and tensors of a file with trained tokens and nothing else.

    Raises:
        ValueError: if the embeddings do not train the same tokens.
    """
    changed = {name: _changed_rows(name, entry, base) for name, entry in embeddings.items()}
    tokens = next(iter(changed.values()))[0]
    if not tokens or any(rows != tokens for rows, _ in changed.values()):
        counts = {name: len(rows) for name, (rows, _) in changed.items()}
        raise ValueError(
            f"PEFT trains the same tokens in all embeddings, at least one; here the numbers of changed rows are "
            f"{counts}. Adapt a weight by LoRA too: then each embedding may have tokens of its own."
        )
    config: Config = {
        "peft_type": "TRAINABLE_TOKENS",
        "target_modules": sorted(embeddings),
        "token_indices": tokens,
        "inference_mode": True,
        "init_weights": True,
    }
    return config, {f"{PREFIX}{name}.trainable_tokens_delta": value for name, (_, value) in changed.items()}


def add_tokens(config: Config, tensors: Tensors, embeddings: Mapping[str, ModuleEntry], base: BaseParams) -> None:
    """Adds the trained rows of embeddings beside a LoRA."""
    if not embeddings:
        return
    if config["peft_type"] != "LORA":
        raise ValueError(
            f"PEFT trains rows of {sorted(embeddings)} with LoRA alone, and the adapter has {config['peft_type']}. "
            "Leave them out, or adapt all weights by LoRA."
        )
    changed = {name: _changed_rows(name, entry, base) for name, entry in embeddings.items()}
    changed = {name: (rows, value) for name, (rows, value) in changed.items() if rows}
    config["trainable_token_indices"] = {name: rows for name, (rows, _) in sorted(changed.items())} or None
    for name, (_, value) in changed.items():
        tensors[f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"] = value


def add_trained(
    config: Config, tensors: Tensors, trained: Mapping[str, ModuleEntry], adapted: Mapping[str, ModuleEntry]
) -> None:
    """Adds parameters that are trained in full: modules with all that they hold, and biases of others.

    Arguments:
        config: of the adapted modules; its `bias` and `modules_to_save` are set.
        tensors: of the adapted modules; those of the trained parameters are added.
        trained: the parameters, by module or by their own names.
        adapted: the adapted modules.

    Raises:
        ValueError: if PEFT cannot hold them.
    """
    saved = _saved_modules(trained)
    biases = {}
    for name, entry in trained.items():
        ((suffix, value),) = module_tensors(name, entry).items()
        module = name.removesuffix(".bias")
        if name == module or module in saved:
            tensors[f"{PREFIX}{name}.{suffix}".removesuffix(".")] = value
        else:
            biases[name] = module in adapted
            tensors[PREFIX + (f"{module}.base_layer.bias" if module in adapted else name)] = value
    if biases:
        _set_bias(config, biases)
    if saved:
        config["modules_to_save"] = sorted(saved)


def _saved_modules(trained: Mapping[str, ModuleEntry]) -> set[str]:
    """The modules that PEFT saves in full: those with a weight."""
    is_vector = {name: not entry.location.is_matrix for name, entry in trained.items()}
    other = [name for name, vector in is_vector.items() if vector and not name.endswith((".weight", ".bias"))]
    if other:
        raise ValueError(
            f"PEFT saves modules in full, and {other} are parameters of no such module. Leave them out of the adapter, "
            "or save them by jlora.save."
        )
    weights = {name.removesuffix(".weight") for name in trained if name.endswith(".weight")}
    return weights | {name for name, vector in is_vector.items() if not vector}


def _set_bias(config: Config, biases: Mapping[str, bool]) -> None:
    """Sets `bias`, given for each trained bias whether its module is adapted."""
    peft_type = config["peft_type"]
    if "bias" not in config:
        raise ValueError(
            f"PEFT trains no biases beside {peft_type}, and the adapter has {sorted(biases)}. Leave them out, or adapt "
            "all weights by LoRA."
        )
    own_biases = {"FOURIERFT": "fourier_only", "MISS": "MiSS_only"}.get(peft_type, f"{peft_type.lower()}_only")
    config["bias"] = own_biases if all(biases.values()) else "all"


def rows_as_full(path: str, update: Update, location: WeightLocation) -> Update:
    """`Rows` of an embedding as a difference of its whole weight, of which PEFT has the rows that change."""
    if not isinstance(update.method, Rows) or location.module.kind != "embedding":
        return update
    value = change_of(path, update, None).array()
    return Update({"d": value}, Full(), location.weight.roles, location.weight.shape)
