"""The names of weights in torch: patterns that map jlora's paths to modules, and are read in both directions."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, final, get_args

from jlora._tree.paths import closest_matches

Kind = Literal["linear", "conv1d", "conv", "embedding", "parameter"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_INDEX = r"\{(\w+)\}"


@final
@dataclasses.dataclass(frozen=True)
class Module:
    """The torch module that holds a weight, for the maps of `jlora.peft` and `jlora.loralib`.

        {
            "layers/{i}/mlp/up/kernel": "model.layers.{i}.mlp.up_proj",
            "layers/{i}/query/kernel": jlora.peft.Module("h.{i}.attn", "conv1d", part=0),
            "layers/{i}/norm/scale": jlora.peft.Module("model.layers.{i}.norm.weight", "parameter"),
            "embed/embedding": jlora.peft.Module("model.embed_tokens", "embedding", tied="lm_head"),
        }

    Arguments:
        name: the name of the module, with `{i}` for an index. An index absent from the path enumerates the stacked axis
            of the weight: `layers/mlp/kernel` of shape (layers, in, out) and `encoder.layer.{i}.mlp`.
        kind: "linear" (torch holds (out, in)), "conv1d" (a linear layer that holds (in, out), PEFT's
            `fan_in_fan_out`), "conv", "embedding" or "parameter". A "parameter" is named in full: a bias, the scale of
            a norm, or the three-dimensional weight of experts. List the experts' parameters of one module in the order
            in which the module defines them.
        part: if one module concatenates several weights along its out axis (query, key and value), the position of this
            weight, from 0 on.
        tied: for an embedding, the module that uses the same weight as the output head. None states that there is no
            such module; `jlora.peft.load` checks this against the program.

    Raises:
        ValueError: if `kind` is not one of those five.
    """

    name: str
    kind: Kind = "linear"
    part: int | None = None
    tied: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"The kind of {self.name} must be one of {', '.join(KINDS)}; it is {self.kind!r}.")


Names = Mapping[str, str | Module | Sequence[str]]


def modules_of(entry: str | Module | Sequence[str]) -> tuple[Module, ...]:
    """The modules of one entry of a map; a plain name is a linear layer."""
    if isinstance(entry, Module):
        return (entry,)
    return tuple(Module(name) for name in ([entry] if isinstance(entry, str) else entry))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a path pattern: `{i}` is a group of digits, the same wherever it recurs."""
    expression, seen = "", set()
    for position, text in enumerate(re.split(_INDEX, pattern)):
        if position % 2 == 0:
            expression += re.escape(text)
        else:
            expression += f"(?P={text})" if text in seen else rf"(?P<{text}>\d+)"
            seen.add(text)
    return re.compile(expression)


def index_names(template: str) -> tuple[str, ...]:
    """The names of the indices in a template, in order, each once."""
    return tuple(dict.fromkeys(re.findall(_INDEX, template)))


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its indices replaced: `fill("h.{i}", {"i": "3"})` is `"h.3"`."""
    return re.sub(_INDEX, lambda match: values[match[1]], template)


def no_match_error(
    heading: str, candidates: Mapping[str, Iterable[str]], names: Names, paths: Iterable[str]
) -> ValueError:
    """The error for names without a counterpart.

    Arguments:
        heading: the first line of the message.
        candidates: for each name without a counterpart, the names that it could have been.
        names: the map.
        paths: of the program; the message lists the patterns of the map that match none of them.
    """
    paths = list(paths)
    lines = [f"{name}: {closest_matches(name, options)}" for name, options in candidates.items()]
    unused = [pattern for pattern in names if not any(compile_pattern(pattern).fullmatch(path) for path in paths)]
    if unused:
        lines.append(f"patterns of names that match no path: {', '.join(unused)}")
    return ValueError(heading + "\n  " + "\n  ".join(lines))
