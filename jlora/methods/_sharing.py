"""Arrays that several weights share: all updates of one adapter with an equal method; one of them holds the arrays."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jlora.methods._base import Adapter, Method, Update


def share(adapter: Adapter) -> Adapter:
    """A new adapter with each shared array once.

    Arguments:
        adapter: new updates, each with all of its arrays.
    """
    out = dict(adapter)
    for method in dict.fromkeys(group_of(update) for update in adapter.values() if update.method.shared_arrays):
        members = {path: update for path, update in adapter.items() if group_of(update) == method}
        arrays = method.share(members)
        for path, update in members.items():
            new = arrays.get(path, {})
            groups = {group: _replaced(getattr(update, group), new) for group in ("factors", "frozen", "initial")}
            out[path] = dataclasses.replace(update, **groups)
    return tie(out)


def tie(adapter: Adapter) -> Adapter:
    """The adapter with each shared array once: in the first update, by path, of those with an equal method.

    Arguments:
        adapter: updates that hold all of their arrays. Of the shared ones those of the first update are kept.
    """
    holders: dict[Method, str] = {}
    for path in sorted(adapter):
        holders.setdefault(group_of(adapter[path]), path)
    return {
        path: update if holders[group_of(update)] == path else _without_shared_arrays(update)
        for path, update in adapter.items()
    }


def untie(adapter: Adapter) -> Adapter:
    """Gives each update the arrays that it shares with others, so that every update stands alone.

    Methods such as TinyLoRA train arrays that all weights of an adapter share, and one of the updates holds them. Untie
    an adapter before some of its updates are taken out or put into another adapter. What was one array is several then:
    if such an adapter is trained, they become different.

    Arguments:
        adapter: an adapter.

    Returns:
        the adapter, in which every update has all of its arrays.

    Raises:
        ValueError: if an update that holds shared arrays is missing.

    Example:
        upper = {path: update for path, update in jlora.untie(adapter).items() if "layer_1" in path}
    """
    if not any(_missing(update) for update in adapter.values()):
        return adapter
    holders: dict[Method, list[str]] = {}
    for path, update in adapter.items():
        if update.method.shared_arrays and not _missing(update):
            holders.setdefault(group_of(update), []).append(path)
    return {
        path: _completed(path, update, adapter, holders.get(group_of(update), [])) for path, update in adapter.items()
    }


def check_all_or_none(name: str, adapter: Adapter, like: Adapter) -> None:
    """Checks that an adapter has all of the weights that share arrays in another one, or none of them.

    Arguments:
        name: of the adapter, for the error.
        adapter: the adapter.
        like: the other one.

    Raises:
        ValueError: if it has some of them.
    """
    for method in {group_of(update) for update in like.values() if update.method.shared_arrays}:
        paths = [path for path, update in like.items() if group_of(update) == method]
        missing = [path for path in paths if path not in adapter]
        if missing and len(missing) < len(paths):
            raise ValueError(
                f"{name} has no update for {missing[0]}, and {len(paths)} weights share arrays by {method}. The "
                "members of a bank must adapt the same weights by such a method."
            )


def _replaced(arrays: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {name: new.get(name, array) for name, array in arrays.items()}


def group_of(update: Update) -> Method:
    """What updates that share arrays have in common: the method, of whichever layers of a stack."""
    return dataclasses.replace(update.method, layers=None)


def _missing(update: Update) -> bool:
    return any(name not in update.factors and name not in update.frozen for name in update.method.shared_arrays)


def _without_shared_arrays(update: Update) -> Update:
    def others(arrays: dict[str, Any]) -> dict[str, Any]:
        return {name: array for name, array in arrays.items() if name not in update.method.shared_arrays}

    groups = {group: others(getattr(update, group)) for group in ("factors", "frozen", "initial")}
    return dataclasses.replace(update, **groups) if update.method.shared_arrays else update


def _completed(path: str, update: Update, adapter: Adapter, holders: list[str]) -> Update:
    """An update with the arrays of the update that holds them."""
    if not _missing(update):
        return update
    if len(holders) != 1:
        held = "no update of the adapter holds them" if not holders else f"{' and '.join(holders[:2])} both hold some"
        raise ValueError(
            f"{path} shares {', '.join(update.method.shared_arrays)} with other weights by {update.method}, but "
            f"{held}. Take updates out of an adapter, or put two adapters together, after jlora.untie(adapter)."
        )
    holder = adapter[holders[0]]
    groups = {
        group: getattr(update, group)
        | {n: a for n, a in getattr(holder, group).items() if n in update.method.shared_arrays}
        for group in ("factors", "frozen", "initial")
    }
    return dataclasses.replace(update, **groups)
