"""Which of several equal tensors a parameter comes from: decided by the parameters around it, never by its values.

An anchor is a block of a parameter whose tensor is known. A scope is the beginning of a path, with an index of the
stack; the anchors below it show where the checkpoint keeps what belongs to it.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from jlora.io.peft.infer.decompose import Part, Source
from jlora.io.peft.infer.words import is_embedding, normalized, skeleton

Name = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unit:
    """A block of a parameter that has one tensor.

    Arguments:
        path: of the parameter.
        part: the block.
        number: of the part among those of the parameter.
    """

    path: str
    part: Part
    number: int = 0

    @functools.cached_property
    def place(self) -> Name:
        """The path in components."""
        return tuple(self.path.split("/"))

    @functools.cached_property
    def stack(self) -> tuple[int, ...]:
        """The indices of the axes along which the parameter is a stack."""
        return tuple(entry for entry in self.part.leaf.index if isinstance(entry, int))


@dataclasses.dataclass(frozen=True)
class _Scope:
    """Where the checkpoint keeps what is below the beginning of a path.

    Arguments:
        prefix: the beginning of the names there.
        others: the beginnings of what belongs to parts of the scope, by the next component of their paths.
        module: the module of torch that all anchors belong to; None if they belong to several.
    """

    prefix: Name
    others: Mapping[str, Name]
    module: Name | None


class Neighbours:
    """Chooses tensors for blocks by their neighbours, one after the other; each choice is an anchor for the next.

    Arguments:
        anchors: the tensor of every block that values have decided.
        candidates: the possible sources of a block that is open.
        told: the paths whose tensors the caller has given.
    """

    def __init__(
        self,
        anchors: Mapping[Unit, Source],
        candidates: Callable[[Unit], Sequence[Source]],
        told: Collection[str] = (),
    ) -> None:
        self._told = set(told)
        self.chosen = dict(anchors)
        self.without_source: list[Unit] = []
        self._candidates = functools.cache(candidates)
        self._index()

    def below(self, place: Name) -> list[Unit]:
        """The anchors whose paths begin so."""
        return self._below.get(place, [])

    def resolve(self, units: Iterable[Unit]) -> dict[Unit, list[Source]]:
        """Decides what can be decided.

        Arguments:
            units: the open blocks.

        Returns:
            the sources that remain possible for each block that stays open.
        """
        remaining = list(units)
        while True:
            options = {unit: self._options(unit) for unit in remaining}
            decided = self._decide({unit: sources for unit, sources in options.items() if sources})
            if not decided:
                break
            self.chosen |= decided
            remaining = [unit for unit in remaining if unit not in decided]
            self._index()
        for unit, sources in options.items():  # a tensor outside of the scope may still be the one
            options[unit] = sources or ([] if self._own_module(unit) is not None else self._unused(unit))
        self.without_source += [unit for unit, sources in options.items() if not sources]
        return {unit: sources for unit, sources in options.items() if sources}

    def _index(self) -> None:
        self._below: dict[Name, list[Unit]] = collections.defaultdict(list)
        self._under: dict[Name, set[Unit]] = collections.defaultdict(set)
        self._transfer: dict[str, set[str]] = collections.defaultdict(set)
        self._scopes: dict[tuple[Name, tuple[int, ...]], _Scope | None] = {}
        for unit, source in self.chosen.items():
            place, name = unit.place, tuple(source.tensor.split("."))
            for end in range(len(place)):
                self._below[place[:end]].append(unit)
            for end in range(len(name)):
                self._under[name[:end]].add(unit)
            self._transfer[skeleton(unit.path)].add(skeleton(source.tensor))
        self._used = set(self.chosen.values())
        self._used_tensors = {source.tensor for source in self._used}

    def _unused(self, unit: Unit) -> list[Source]:
        """The candidates that no block has yet: no part of a whole tensor, and for a part not the same one."""
        return [
            source
            for source in self._candidates(unit)
            if source not in self._used and not (source.block.is_all and source.tensor in self._used_tensors)
        ]

    def _own_module(self, unit: Unit) -> Name | None:
        """The module of torch that holds all that is known of a constant parameter's own module: of the weight, say."""
        scope = self._scope(unit.place[:-1], unit.stack)
        return scope.module if scope is not None and unit.part.constant is not None else None

    def _options(self, unit: Unit) -> list[Source]:
        """The candidates in the nearest scope that has some; all if no scope has any anchors."""
        candidates = self._unused(unit) or (list(self._candidates(unit)) if unit.part.constant is None else [])
        module = self._own_module(unit)
        if module is not None:
            return [source for source in candidates if _is_below(source.tensor, module)]
        is_anchored = False
        for end in range(len(unit.place) - 1, -1, -1):
            scope = self._scope(unit.place[:end], unit.stack)
            if scope is None:
                continue
            is_anchored = True
            below = [s for s in candidates if _is_in_scope(s.tensor, scope, unit.place[end])]
            if below:
                return below
        return [] if is_anchored and unit.part.constant is not None else candidates

    def _scope(self, place: Name, stack: tuple[int, ...]) -> _Scope | None:
        key = (place, stack)
        if key not in self._scopes:
            anchors = [unit for unit in self._below[place] if _is_same_stack(unit.stack, stack)]
            self._scopes[key] = self._scope_of(place, anchors) if anchors else None
        return self._scopes[key]

    def _scope_of(self, place: Name, anchors: list[Unit]) -> _Scope:
        modules = [self._module(unit) for unit in anchors]
        prefix = _common_prefix(modules)
        module = prefix if all(module == prefix for module in modules) else None
        within = set(self._below[place])
        while prefix and not prefix[-1].isdigit() and self._under[prefix[:-1]] <= within:
            prefix = prefix[:-1]
        by_component = collections.defaultdict(list)
        for unit, name in zip(anchors, modules, strict=True):
            by_component[unit.place[len(place)]].append(name)
        others = {component: _common_prefix(found) for component, found in by_component.items()}
        return _Scope(prefix, others, module)

    def _module(self, unit: Unit) -> Name:
        """The torch module that an anchor's tensor belongs to."""
        return tuple(self.chosen[unit].tensor.split(".")[:-1])

    def _decide(self, options: Mapping[Unit, list[Source]]) -> dict[Unit, Source]:
        """The choices that one of the rules makes, the surest rule first."""
        for rule in (self._as_told, self._in_own_module, self._as_elsewhere, self._by_words, self._by_elimination):
            decided = rule(options)
            if decided:
                return decided
        return {}

    def _as_told(self, options: Mapping[Unit, list[Source]]) -> dict[Unit, Source]:
        """The tensor that the caller has given."""
        return _unique({unit: sources for unit, sources in options.items() if unit.path in self._told})

    def _in_own_module(self, options: Mapping[Unit, list[Source]]) -> dict[Unit, Source]:
        """The only candidate in the module that holds the weight beside it."""
        return _unique({unit: sources for unit, sources in options.items() if self._own_module(unit) is not None})

    def _as_elsewhere(self, options: Mapping[Unit, list[Source]]) -> dict[Unit, Source]:
        """The same as in another layer."""
        choices = {}
        for unit, sources in options.items():
            names = self._transfer.get(skeleton(unit.path), set())
            choices[unit] = [source for source in sources if skeleton(source.tensor) in names]
        return _unique(choices)

    def _by_words(self, options: Mapping[Unit, list[Source]]) -> dict[Unit, Source]:
        """The tensor whose name below the scope's prefix has the same words as the path below the scope."""
        choices = {}
        for unit, sources in options.items():
            choices[unit] = [source for source in sources if self._says_the_same(unit, source)]
            if len(sources) > 1 and unit.part.constant is None and not choices[unit]:
                wanted = is_embedding(unit.path)
                alike = [source for source in sources if is_embedding(source.tensor) is wanted]
                choices[unit] = alike if wanted is not None else []
        return _unique(choices)

    def _says_the_same(self, unit: Unit, source: Source) -> bool:
        name = tuple(source.tensor.split("."))
        for end in range(len(unit.place) - 1, -1, -1):
            scope = self._scope(unit.place[:end], unit.stack)
            prefix = scope.prefix if scope is not None else ()
            if _is_below(source.tensor, prefix):
                tail = ".".join(name[len(prefix) :])
                if normalized("/".join(unit.place[end:])) == normalized(tail):
                    return True
        return False

    def _by_elimination(self, options: Mapping[Unit, list[Source]]) -> dict[Unit, Source]:
        """The only candidate, if no other block could have it."""
        wanted = collections.Counter(source for sources in options.values() for source in sources)
        return {
            unit: sources[0]
            for unit, sources in options.items()
            if len(sources) == 1 and (wanted[sources[0]] == 1 or unit.part.constant is None)
        }


def _is_below(tensor: str, prefix: Name) -> bool:
    return tuple(tensor.split(".")[: len(prefix)]) == prefix


def _is_in_scope(tensor: str, scope: _Scope, component: str) -> bool:
    """Whether a tensor may belong to a component of a scope: no other component has its tensors there."""
    others = [p for other, p in scope.others.items() if other != component and len(p) > len(scope.prefix)]
    return _is_below(tensor, scope.prefix) and not any(_is_below(tensor, prefix) for prefix in others)


def _is_same_stack(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a == b for a, b in zip(one, other, strict=False))


def _common_prefix(names: Sequence[Name]) -> Name:
    """The longest beginning that at least three quarters of some names have."""
    prefix: Name = ()
    alike = list(names)
    while True:
        following = collections.Counter(name[len(prefix)] for name in alike if len(name) > len(prefix))
        if not following:
            return prefix
        component, count = following.most_common(1)[0]
        if count < 0.75 * len(names):
            return prefix
        prefix = (*prefix, component)
        alike = [name for name in alike if name[: len(prefix)] == prefix]


def _unique(choices: Mapping[Unit, Sequence[Source]]) -> dict[Unit, Source]:
    """The choices of one tensor that no other block claims by the same rule."""
    claims = collections.Counter(source for sources in choices.values() for source in sources)
    return {
        unit: sources[0]
        for unit, sources in choices.items()
        if len(sources) == 1 and (claims[sources[0]] == 1 or unit.part.constant is None)
    }
