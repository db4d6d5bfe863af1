"""The table of rules, by the name of the primitive: `register_rule` fills it, and the interpreter reads it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from jlora._compat import Primitive
from jlora._interpreter.context import Value

Rule = Callable[..., Sequence[Value] | None]
R = TypeVar("R", bound=Rule)

RULES: dict[str, Rule] = {}


def register_rule(*primitives: str | Primitive) -> Callable[[R], R]:
    """Registers what a JAX primitive does to an adapted weight.

        @jlora.extend.register_rule("transpose")
        def transpose(ctx, eqn, f):
            (base,) = jlora.extend.bind(eqn, f.base)
            return [jlora.extend.relabel(f, base, [f.axes[k] for k in eqn.params["permutation"]])]

    A rule is `rule(ctx, eqn, *values) -> list of values, or None`. It is called for an equation that has at least one
    `AdaptedWeight` among its values, and returns one value for each of the equation's outputs: an array, or an
    `AdaptedWeight` if the output is still a weight. If it returns None, the weights are materialised. Rules apply
    inside `jit`, `scan`, `checkpoint` and other programs too.

    Arguments:
        primitives: the primitives, or their names.

    Returns:
        a decorator that returns the rule unchanged.

    Raises:
        TypeError: if an argument is neither a primitive nor a name.
        ValueError: if a primitive has a rule already.
    """
    names = [_name(primitive) for primitive in primitives]

    def register(rule: R) -> R:
        for name in names:
            if name in RULES:
                old = RULES[name]
                raise ValueError(
                    f"The primitive {name!r} has a rule already, {old.__module__}.{old.__qualname__}. Expected a "
                    "primitive without a rule: remove one of the two registrations."
                )
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _name(primitive: str | Primitive) -> str:
    name = getattr(primitive, "name", primitive)
    if not isinstance(name, str) or callable(primitive):
        raise TypeError(
            f"register_rule expects primitives or their names, not {primitive!r}. "
            'Write @register_rule("name") above the rule.'
        )
    return name
