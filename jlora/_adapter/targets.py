"""Targets: which weights an adapter updates, and by which method."""

from collections.abc import Callable, Mapping

from jlora._interpreter.site import Site
from jlora._trace.sites import Sites, check_sites
from jlora._tree.patterns import select_by_pattern
from jlora.methods._base import Method

Targets = Mapping[str, Method | None] | Method | Callable[[str, Site], Method | None]


def select_methods(sites: Sites, targets: Targets) -> dict[str, Method]:
    """The method of every path that the targets select.

    Raises:
        TypeError: if `sites` is not from `jlora.trace`, or a target is not a method.
        ValueError: as `select_by_pattern`, and if a single method has nothing to adapt.
    """
    check_sites(sites)
    check_targets(targets)
    if isinstance(targets, Method):
        selected = {path: targets for path, site in sites.items() if site.is_product}
        if not selected:
            raise ValueError(
                "No matmul or convolution of the program uses a parameter. print(sites) shows all; if it lists one "
                "array without a path, pass the model's parameters before its input, as params."
            )
        return selected
    if isinstance(targets, Mapping):
        return select_by_pattern(sites, targets)
    return _select_by_function(sites, targets)


def check_targets(targets: Targets) -> None:
    """Raises if targets are neither a method, nor a dict from patterns to methods, nor a function.

    Raises:
        TypeError: with what is in the place of a method.
    """
    if isinstance(targets, Mapping):
        for pattern, target in targets.items():
            if not isinstance(target, Method | None):
                raise _wrong_type(f"the pattern {pattern!r} has", target)
    elif not isinstance(targets, Method) and (not callable(targets) or isinstance(targets, type)):
        raise _wrong_type("this is", targets)


def _select_by_function(sites: Sites, choose: Callable[[str, Site], Method | None]) -> dict[str, Method]:
    selected: dict[str, Method] = {}
    for path, site in sites.items():
        method = choose(path, site)
        if not isinstance(method, Method | None):
            raise _wrong_type(f"for {path} it returned", method)
        if method is not None:
            selected[path] = method
    if not selected:
        raise ValueError(
            f"The function of targets returned None for all {len(sites)} parameters, so nothing would train. It gets "
            "the path and the site of each, and returns its method."
        )
    return selected


def _wrong_type(subject: str, target: object) -> TypeError:
    given = f"the class {target.__name__}, not an instance" if isinstance(target, type) else type(target).__name__
    return TypeError(
        "Targets are a method such as jlora.LoRA(rank=8), a dict from patterns to methods, or a function that returns "
        f"a method or None for a path and its site; {subject} {given}."
    )
