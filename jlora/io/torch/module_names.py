"""The names of weights in torch: patterns that map jlora's paths to modules, and are read in both directions."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, final, get_args

from jlora._trace.sites import check_sites
from jlora._tree.paths import closest_matches

Kind = Literal["linear", "conv1d", "conv", "embedding", "parameter"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_INDEX = r"\{(\w+)\}"  # in a path
_EXPRESSION = r"\{([\w*+-]+)\}"  # in a name: `{i}`, `{i-1}`, `{6*i+j}`
_MAX_LISTED = 12  # unused patterns in an error; a ready map has many
_TERM = r"((\d+\*)?[A-Za-z_]\w*|\d+)"


@final
@dataclasses.dataclass(frozen=True, repr=False)
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
            of the weight: `layers/mlp/kernel` of shape (layers, in, out) and `encoder.layer.{i}.mlp`. Whole multiples
            and sums are allowed too: `{2*i+1}` if every other layer is in the stack.
        kind: "linear" (torch holds (out, in)), "conv1d" (a linear layer that holds (in, out), PEFT's
            `fan_in_fan_out`), "conv", "embedding" or "parameter". A "parameter" is named in full: a bias, the scale of
            a norm, or the three-dimensional weight of experts. List the experts' parameters of one module in the order
            in which the module defines them.
        part: if one module concatenates several weights along its out axis (query, key and value), the position of this
            weight, from 0 on.
        tied: for an embedding, the module that uses the same weight as the output head. None states that there is no
            such module; `jlora.peft.load` checks this against the program.
        size: if a weight concatenates several modules of different widths (grouped-query attention), the size of this
            one along the weight's out axes. None divides the weight evenly.

    Raises:
        ValueError: if `kind` is not one of those five.
    """

    name: str
    kind: Kind = "linear"
    part: int | None = None
    tied: str | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"The kind of {self.name} must be one of {', '.join(KINDS)}; it is {self.kind!r}.")

    def __repr__(self) -> str:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = [f"{n}={v!r}" for n, v in fields.items() if v is not None and n not in ("name", "kind")]
        kind = [] if self.kind == "linear" else [repr(self.kind)]
        return f"Module({', '.join([repr(self.name), *kind, *given])})"


Entry = str | Module | Sequence[str | Module] | None
Names = Mapping[str, str | Module | Sequence[str | Module] | None]


def modules_of(entry: Entry) -> tuple[Module, ...]:
    """The modules of one entry of a map; a plain name is a linear layer, None has no module in torch."""
    if entry is None:
        return ()
    entries = [entry] if isinstance(entry, (str, Module)) else entry
    return tuple(one if isinstance(one, Module) else Module(one) for one in entries)


def entry_of(modules: Sequence[Module]) -> Entry:
    """The shortest entry of a map for some modules: the inverse of `modules_of`."""
    if not modules:
        return None
    entries = [one.name if one == Module(one.name) else one for one in modules]
    return entries[0] if len(entries) == 1 else tuple(entries)


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
    terms = [term for expression in re.findall(_EXPRESSION, template) for term in _terms(expression)]
    return tuple(dict.fromkeys(index for _, index in terms if index))


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its indices replaced: `fill("h.{2*i+1}", {"i": "3"})` is `"h.7"`."""

    def number(match: re.Match[str]) -> str:
        if match[1] in values:
            return values[match[1]]
        return str(sum(factor * (int(values[index]) if index else 1) for factor, index in _terms(match[1])))

    return re.sub(_EXPRESSION, number, template)


def bind(template: str, values: Mapping[str, str]) -> str:
    """A template with some of its indices replaced: `bind("h.{i+2*j}", {"i": "1"})` is `"h.{2*j+1}"`."""

    def rest(match: re.Match[str]) -> str:
        terms = _terms(match[1])
        constant = sum(factor * (int(values[i]) if i else 1) for factor, i in terms if not i or i in values)
        others = "+".join(f"{factor}*{i}" if factor != 1 else i for factor, i in terms if i and i not in values)
        return "{" + others + (f"{constant:+d}" if constant else "") + "}" if others else str(constant)

    return re.sub(_EXPRESSION, rest, template)


def _terms(expression: str) -> list[tuple[int, str]]:
    """The factors of a sum and their indices; a constant has the index ""."""
    if not re.fullmatch(rf"{_TERM}([+-]{_TERM})*", expression):
        raise ValueError(f"{{{expression}}} is not a sum of indices and numbers, such as {{i}} or {{2*i+1}}.")
    matches = re.findall(r"([+-]?)(?:(\d+)\*)?(?:([A-Za-z_]\w*)|(\d+))", expression)
    return [(int(sign + (factor or number or "1")), index) for sign, factor, index, number in matches]


def absent_paths(names: Names, paths: Iterable[str]) -> set[str]:
    """The paths that a map states to have no counterpart in torch, by None.

    Arguments:
        names: the map.
        paths: of the program.
    """
    patterns = [compile_pattern(pattern) for pattern, entry in names.items() if entry is None]
    return {path for path in paths if any(pattern.fullmatch(path) for pattern in patterns)}


def bias_hint(path: str, names: Names) -> str:
    """What to add to a map for the bias of a layer whose weight it knows; empty if it knows none beside the path.

    Arguments:
        path: of the bias.
        names: the map.
    """
    parent, _, last = path.rpartition("/")
    for pattern, entry in names.items():
        layer = pattern.rpartition("/")[0]
        modules = modules_of(entry)
        if modules and modules[0].kind not in ("parameter", "embedding") and compile_pattern(layer).fullmatch(parent):
            biases = [dataclasses.replace(m, name=f"{m.name}.bias", kind="parameter") for m in modules]
            written = biases[0] if len(biases) == 1 else tuple(biases)
            return f"names[{layer + '/' + last!r}] = {written!r}"
    return ""


def check_inputs(sites: object, names: object) -> None:
    """Raises if the sites and the map of a call are other things, or change places.

    Raises:
        TypeError: with what to pass.
    """
    check_sites(sites)
    if not isinstance(names, Mapping):
        raise TypeError(
            "names is a dict from paths of the program to modules, such as {'layers/{i}/up/kernel': "
            f"'model.layers.{{i}}.mlp.up_proj'}}, not {type(names).__name__}."
        )


def no_match_error(
    heading: str,
    candidates: Mapping[str, Iterable[str]],
    names: Names,
    paths: Iterable[str],
    hints: Iterable[str] = (),
) -> ValueError:
    """The error for names without a counterpart.

    Arguments:
        heading: the first line of the message.
        candidates: for each name without a counterpart, the names that it could have been.
        names: the map.
        paths: of the program; the message lists the patterns of the map that match none of them: those whose modules
            have no counterpart, or all if they are few.
        hints: what to write.
    """
    paths = list(paths)
    lines = [f"{name}: {closest_matches(name, options)}" for name, options in candidates.items()]
    unused = [pattern for pattern in names if not any(compile_pattern(pattern).fullmatch(path) for path in paths)]
    lines += [f"write {hint}" for hint in dict.fromkeys(hints)]
    unused = [pattern for pattern in unused if _is_for(names[pattern], candidates)] or unused
    if 0 < len(unused) <= _MAX_LISTED:
        lines.append(f"patterns of names that match no path: {', '.join(unused)}")
    lines.append(
        "An entry of names is a path of the program with its module: {'layers/{i}/up': 'model.layers.{i}.up'}."
    )
    return ValueError(heading + "\n  " + "\n  ".join(lines))


def _is_for(entry: Entry, candidates: Iterable[str]) -> bool:
    """Whether an entry of a map names one of these modules."""
    forms = [re.sub(r"\\\{.*?\\\}", r"\\d+", re.escape(module.name)) for module in modules_of(entry)]
    return any(re.fullmatch(form, name) for form in forms for name in candidates)
