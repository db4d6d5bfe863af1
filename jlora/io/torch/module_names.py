"""Names of one weight in two worlds: paths of jlora and modules of torch, by patterns that are read both ways."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, final

from jlora._interpreter.context import Role, matrix_side
from jlora._tree.paths import closest_matches

KINDS = ("linear", "conv1d", "conv", "embedding", "parameter")
Index = tuple[int, ...]


@final
@dataclasses.dataclass(frozen=True)
class Module:
    """Where a weight lies in torch.

    Arguments:
        name: the module, with `{i}` for an index. An index that the path lacks runs over the weight's stack axes, in
            order: `layers/mlp/kernel` of shape (layers, in, out) and `encoder.layer.{i}.mlp`.
        kind: "linear", "conv1d" (a linear layer that holds its weight as (in, out), `fan_in_fan_out`), "conv",
            "embedding", or "parameter", where the name is that of a parameter: a bias, a norm's scale, or the experts'
            weight in three dimensions. Such weights of one module stand in the module's own order.
        part: for a module that holds several weights side by side along its out axis (query, key and value), which of
            them this is, from 0 on.
        tied: for an embedding, the module that uses the same weight as the output head; None says that there is none,
            which `load` checks against the program.
    """

    name: str
    kind: Literal["linear", "conv1d", "conv", "embedding", "parameter"] = "linear"
    part: int | None = None
    tied: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"The kind of {self.name} is one of {', '.join(KINDS)}, not {self.kind!r}.")


Names = Mapping[str, str | Module | Sequence[str]]


class Weight(NamedTuple):
    """What placing a weight needs to know of it; `roles` is empty where no product uses it."""

    shape: tuple[int, ...]
    roles: tuple[Role, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """A weight and the modules that hold it.

    Arguments:
        path: of the weight.
        weight: its shape and roles.
        module: its entry among the names, the first one of several.
        loops: how many of its stack axes the modules' names run over.
        modules: for every index of those, the modules that lie side by side in the weight.
    """

    path: str
    weight: Weight
    module: Module
    loops: int
    modules: dict[Index, tuple[str, ...]]

    @property
    def pieces(self) -> int:
        return len(next(iter(self.modules.values())))

    def axes(self, role: Role) -> tuple[int, ...]:
        """The axes in a role; without roles, the leading ones are the stack and the others out."""
        shape, roles = self.weight
        if not roles:
            first = range(self.loops)
            return tuple(first) if role == "stack" else tuple(range(len(shape)))[self.loops :] if role == "out" else ()
        return tuple(k for k, r in enumerate(roles) if matrix_side(r) == role)

    def sizes(self, role: Role) -> tuple[int, ...]:
        return tuple(self.weight.shape[k] for k in self.axes(role))

    @property
    def experts(self) -> tuple[int, ...]:
        """The stack axes that the module itself holds."""
        return self.sizes("stack")[self.loops :]

    @property
    def channel(self) -> int:
        """Which of a kernel's in axes holds the channels, and is not of its window."""
        return [self.weight.roles[axis] for axis in self.axes("in")].index("in")

    @property
    def channels(self) -> tuple[int, ...]:
        """The sizes of the in axes without a window."""
        return tuple(n for n, role in zip(self.weight.shape, self.weight.roles, strict=False) if role == "in")

    @property
    def kernel(self) -> tuple[int, ...]:
        """The channels and the spatial sizes of a convolution's kernel."""
        inner = list(self.sizes("in"))
        return (inner.pop(self.channel), *inner) if self.module.kind == "conv" and inner else ()

    @property
    def is_matrix(self) -> bool:
        return bool(self.sizes("in"))

    def count(self, role: Role) -> int:
        return math.prod(self.sizes(role))


def places(names: Names, weights: Mapping[str, Weight]) -> dict[str, Place]:
    """Every weight that the names know, in the order of the names.

    Raises:
        ValueError: where an index of a path is missing in the name, where axes and indices do not fit, and where two
            weights claim one module.
    """
    found: dict[str, Place] = {}
    for pattern, entry in names.items():
        modules = _modules(entry)
        regex = _regex(pattern)
        lost = sorted({i for m in modules for i in regex.groupindex if f"{{{i}}}" not in m.name})
        if lost:
            raise ValueError(f"{pattern!r} has the index {lost[0]!r}, and {modules[0].name!r} does not.")
        for path, weight in weights.items():
            match = regex.fullmatch(path)
            if match and path not in found:
                found[path] = _place(path, weight, modules, match.groupdict())
    claims: dict[tuple[str, Any], str] = {}
    for place in found.values():
        for name in itertools.chain(*place.modules.values()):
            other = claims.setdefault((name, place.module.part), place.path)
            if other != place.path:
                raise ValueError(f"{other} and {place.path} both claim {name}; give each a part, or another name.")
    return found


def _modules(entry: str | Module | Sequence[str]) -> tuple[Module, ...]:
    if isinstance(entry, Module):
        return (entry,)
    return tuple(Module(name) for name in ([entry] if isinstance(entry, str) else entry))


def _regex(pattern: str) -> re.Pattern[str]:
    """The pattern with every index as a group of digits."""
    out, seen = "", set()
    for k, part in enumerate(re.split(r"\{(\w+)\}", pattern)):
        if k % 2 == 0:
            out += re.escape(part)
        else:
            out += f"(?P={part})" if part in seen else rf"(?P<{part}>\d+)"
            seen.add(part)
    return re.compile(out)


def _place(path: str, weight: Weight, modules: tuple[Module, ...], known: Mapping[str, str]) -> Place:
    free = list(dict.fromkeys(i for i in re.findall(r"\{(\w+)\}", modules[0].name) if i not in known))
    first = modules[0]
    place = Place(path, weight, first, min(len(free), len(weight.shape)), {})
    stack, spare = place.sizes("stack"), 1 if first.kind == "parameter" and weight.roles else 0
    if not len(free) <= len(stack) <= len(free) + spare:
        raise ValueError(
            f"{path} {weight.shape} has {len(stack)} stack axes, and {first.name!r} has the indices {free} for them: "
            "give one index to each."
        )
    if spare and place.is_matrix and len(stack) == len(free):
        raise ValueError(f"{path} {weight.shape} has no axis of experts, and {first.name!r} is a parameter of experts.")
    filled = {}
    for index in itertools.product(*(range(n) for n in stack[: len(free)])):
        values = {**known, **dict(zip(free, map(str, index), strict=True))}
        filled[index] = tuple(fill(module.name, values) for module in modules)
    tied = None if first.tied is None else fill(first.tied, known)
    return dataclasses.replace(place, module=dataclasses.replace(first, tied=tied), modules=filled)


def fill(template: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: values[m[1]], template)


def unmatched(names: Names, paths: Iterable[str]) -> list[str]:
    """The patterns that match none of some paths."""
    paths = list(paths)
    return [pattern for pattern in names if not any(_regex(pattern).fullmatch(path) for path in paths)]


def misfit(head: str, missing: Mapping[str, Iterable[str]], names: Names, paths: Iterable[str]) -> ValueError:
    """The error for what found no partner: each with its near misses, and the patterns that matched nothing."""
    paths = list(paths)
    lines = [f"{one}: {closest_matches(one, known)}" for one, known in missing.items()]
    idle = unmatched(names, paths)
    if idle:
        lines.append(f"patterns of names that match no path: {', '.join(idle)}")
    return ValueError(head + "\n  " + "\n  ".join(lines))


class Owner(NamedTuple):
    """A weight that a module holds, or holds a part of: the index of its stack, and the piece beside others."""

    place: Place
    at: Index
    piece: int


Owners = dict[str, list[Owner]]


def owners_of(found: Mapping[str, Place]) -> Owners:
    """The weights of every module, its parts in order; a parameter goes by its own name."""
    out: Owners = collections.defaultdict(list)
    for place in found.values():
        for index, names in place.modules.items():
            for piece, name in enumerate(names):
                out[name].append(Owner(place, index, piece))
    return {name: sorted(own, key=lambda o: o.place.module.part or 0) for name, own in out.items()}


def bias_of(place: Place, owners: Owners) -> str | None:
    """The path of a layer's bias, where the names know it."""
    name = f"{next(iter(place.modules.values()))[0]}.bias"
    return next((o.place.path for o in owners.get(name, ()) if o.place.module.part == place.module.part), None)
