"""The words in the names of parameters, in one spelling for JAX and torch."""

import re

_SYNONYMS = {
    **dict.fromkeys(("kernel", "scale", "embedding", "weight", "gamma", "w"), "weight"),
    **dict.fromkeys(("beta", "b"), "bias"),
    **dict.fromkeys(("ln", "layernorm", "rmsnorm", "layrnorm"), "norm"),
    **dict.fromkeys(("q", "k", "v"), None),
    **{"attn": "attention", "attentions": "attention", "embeddings": "embed", "embedding": "embed"},
}
_HEADS = ("head", "logits", "unembed", "output", "decoder", "cls")
_EMBEDDINGS = ("embed", "embedding", "embeddings", "embedder", "wte", "shared", "tokens", "token")


def words(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, cut at dots, slashes, underscores and before digits."""
    text = re.sub(r"(layer|rms)_?norm", "norm", name.lower())
    return tuple(re.findall(r"[a-z]+|\d+", text))


def normalized(name: str) -> tuple[str, ...]:
    """The words of a name with one word for each meaning; the last one says what a parameter is of its module."""
    *module, kind = words(name)
    replaced = [_SYNONYMS.get(word) or word for word in module]
    return (*replaced, _SYNONYMS.get(kind) or kind)


def skeleton(name: str) -> str:
    """A name with `#` for every number that is a component of it."""
    return re.sub(r"(?<![^./])\d+(?![^./])|(?<=_)\d+(?=[/.])", "#", name)


def is_embedding(name: str) -> bool | None:
    """Whether a name is that of an embedding; False if it is that of an output head, None if neither."""
    contained = set(words(name))
    if contained & set(_HEADS) and not contained & set(_EMBEDDINGS):
        return False
    return True if contained & set(_EMBEDDINGS) else None
