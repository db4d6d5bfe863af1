"""What tracing finds out about a weight."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jlora._interpreter.context import Role, Use, matrix_side

_LOOKUPS = ("gather", "dynamic_slice")


@dataclasses.dataclass(frozen=True)
class Site:
    """One weight as the program uses it.

    Arguments:
        path: its name.
        shape: its shape.
        dtype: its dtype.
        sharding: its sharding, where the traced parameters had one.
        uses: every equation that consumes it.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: Any
    uses: tuple[Use, ...]

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of every axis, `()` where no product or lookup uses the weight.

        The first use that names an axis decides. An axis that every use runs through (layers of a scan, experts)
        is a stack.
        """
        speaking = [dict(use.roles) for use in self.uses if use.roles]
        if not speaking:
            return ()
        found: dict[int, Role] = {}
        for roles in speaking:
            for axis, role in roles.items():
                if found.get(axis, "stack") == "stack":
                    found[axis] = role
        return tuple(found.get(axis, "stack") for axis in range(len(self.shape)))

    def sizes(self, role: Role) -> tuple[int, ...]:
        """The sizes of the axes in a role; those of a window, which is contracted too, are among those of "in"."""
        return tuple(n for n, r in zip(self.shape, self.roles, strict=True) if role in (r, matrix_side(r)))

    @property
    def max_rank(self) -> int:
        """The largest rank that an update of this weight can have."""
        return min(math.prod(self.sizes("in")), math.prod(self.sizes("out"))) if self.roles else 0

    @property
    def is_lookup(self) -> bool:
        """Whether the program reads rows of the weight before it does anything else with it: an embedding."""
        return next((use.primitive in _LOOKUPS for use in self.uses if use.roles), False)

    @property
    def is_product(self) -> bool:
        """Whether a product or a convolution consumes the weight."""
        return self.unsupported_reason == "" and any(use.roles and use.primitive not in _LOOKUPS for use in self.uses)

    @property
    def flops(self) -> float:
        """FLOPs of one forward pass in this weight's products."""
        return sum(use.flops for use in self.uses)

    @property
    def is_trainable(self) -> bool:
        """Whether any update could change what the program computes: a floating-point weight that it uses."""
        return bool(self.uses) and bool(jnp.issubdtype(self.dtype, jnp.floating))

    @property
    def unsupported_reason(self) -> str:
        """Why a low-rank method cannot adapt the weight; empty where it can."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            return f"its dtype is {self.dtype}, and only floating-point weights can be adapted"
        if not self.uses:
            return "the program does not use it"
        if not self.roles:
            used = ", ".join(sorted({use.primitive for use in self.uses}))
            return f"no product, convolution or lookup uses it (only {used})"
        if not {"in", "out"} <= set(map(matrix_side, self.roles)):
            return f"its axes are all {self.roles[0]!r}, so it has no low-rank form"
        return ""
