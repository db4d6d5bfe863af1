"""Output heads that are tied to embeddings: PEFT stores both, and jlora has one weight."""

from collections.abc import Mapping

import numpy as np

from jlora._trace.sites import Sites
from jlora.io.peft.config import Config
from jlora.io.peft.method_fields import method_of
from jlora.io.peft.targets import tokens_of
from jlora.io.peft.tensors import Tensors
from jlora.io.torch.weight_location import WeightLocation

_TIED = (("lora_embedding_A", "lora_B.weight"), ("lora_embedding_B", "lora_A.weight"))  # transposes of each other


def tied_heads(
    adapters: Mapping[str, Tensors], locations: Mapping[str, WeightLocation], sites: Sites, config: Config
) -> set[str]:
    """The output heads that the file adapts together with the embedding that they are tied to.

    Arguments:
        adapters: for every adapted module its tensors by suffix.
        locations: of the weights that the map knows.
        sites: of the program.
        config: the configuration.

    Raises:
        ValueError: if the names or the file tie other weights than the program: jlora adapts every use of a weight.
    """
    heads = set()
    for path, location in locations.items():
        head, embedding = location.module.tied, location.first_modules[0]
        is_tied = sites[path].is_lookup and sites[path].is_product
        if head is not None and not is_tied:
            raise ValueError(f"The names tie {path} to {head}, and in the program it is no output head.")
        if not is_tied or not (embedding in adapters or head in adapters):
            continue
        if head is None or not _are_alike(config, adapters, embedding, head):
            raise ValueError(
                f"{path} is an embedding and the output head at once, and jlora adapts both uses alike; the file does "
                "not. Train with ensure_weight_tying=True and name the head, Module(..., 'embedding', tied='lm_head'), "
                "or untie them in the program."
            )
        if "lora_magnitude_vector" in adapters[embedding]:
            raise ValueError(
                f"{embedding} is tied to {head}, and DoRA's magnitudes differ between the two in PEFT, so no update of "
                "the weight equals both. Train it by LoRA, or untie them in the program."
            )
        heads.add(head)
    return heads


def _are_alike(config: Config, adapters: Mapping[str, Tensors], embedding: str, head: str) -> bool:
    """Whether the file has the same update for an embedding and for the head, whose weight is the transpose."""
    one, other = adapters.get(embedding, {}), adapters.get(head, {})
    is_equal = all(e in one and h in other and np.array_equal(one[e], other[h].T) for e, h in _TIED)
    return is_equal and method_of(config, embedding) == method_of(config, head)


def tied_modules(locations: Mapping[str, WeightLocation], sites: Sites) -> dict[str, str]:
    """The embeddings by the output heads that are tied to them, as the map names them."""
    return {
        location.module.tied: location.first_modules[0]
        for path, location in locations.items()
        if location.module.tied is not None and sites[path].is_lookup and sites[path].is_product
    }


def without_tied_heads(values: Tensors, embeddings: Mapping[str, str], config: Config) -> Tensors:
    """Trained weights or rows without those of tied output heads, which are those of the embeddings.

    Arguments:
        values: by module.
        embeddings: by output head, from `tied_modules`.
        config: the configuration.

    Raises:
        ValueError: if the file trains the two differently, or the head alone.
    """
    values = dict(values)
    for head, embedding in embeddings.items():
        if head not in values:
            continue
        value = values.pop(head)
        has_same_tokens = tokens_of(config, head) in ([], tokens_of(config, embedding))
        if embedding not in values or not has_same_tokens or not np.array_equal(values[embedding], value):
            raise ValueError(
                f"{embedding} is an embedding and the output head {head} at once, and the file trains the head "
                "alone or differently. Train both with ensure_weight_tying=True, or untie them in the program."
            )
    return values
