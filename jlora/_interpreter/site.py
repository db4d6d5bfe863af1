"""One weight as a program uses it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._interpreter.context import Role, Use, matrix_side


@dataclasses.dataclass(frozen=True)
class Site:
    """One parameter as the program uses it: its path, shape, roles of axes, and the equations that consume it.

    Arguments:
        path: its path.
        shape: its shape.
        dtype: its dtype.
        sharding: its sharding, or None if the traced parameters had none.
        uses: every equation that consumes it.
        stated_roles: the role of every axis, if the user has stated them (`jlora.trace(..., roles=)`).
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding | None
    uses: tuple[Use, ...]
    stated_roles: tuple[Role, ...] = ()

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of every axis: as stated, else as traced."""
        return self.stated_roles or self.traced_roles

    @property
    def traced_roles(self) -> tuple[Role, ...]:
        """The role of every axis in the program, or `()` if no product, convolution or lookup uses the weight.

        The first use that specifies an axis decides. An axis that every use leaves alone (layers of a scan, experts)
        is a stack.
        """
        specified = [dict(use.roles) for use in self.uses if use.roles]
        if not specified:
            return ()
        role_of: dict[int, Role] = {}
        for roles in specified:
            for axis, role in roles.items():
                if role_of.get(axis, "stack") == "stack":
                    role_of[axis] = role
        return tuple(role_of.get(axis, "stack") for axis in range(len(self.shape)))

    def with_roles(self, roles: Sequence[str]) -> "Site":
        """The weight with roles that the user states.

        Raises:
            ValueError: if there is not one role for each axis, if an axis is neither a stack nor what the program does
                with it, or if no in axis or no out axis is left.
        """
        traced = self.traced_roles
        options = [{"stack"} if role == "stack" else {"stack", role, matrix_side(role)} for role in traced]
        agree = len(roles) == len(traced) and all(role in option for role, option in zip(roles, options, strict=True))
        if agree and {"in", "window"} & set(roles) and "out" in roles:
            return dataclasses.replace(self, stated_roles=tuple(roles))
        uses = f"uses its axes as {traced}" if traced else "uses it in no product, convolution or lookup"
        raise ValueError(
            f"{self.path} {self.shape} cannot have the stated roles {tuple(roles)}: the program {uses}. State "
            "one role for each axis, the program's own, or 'stack' for an axis of layers or experts; at least one axis "
            "stays 'in', and one 'out'."
        )

    def sizes(self, role: Role) -> tuple[int, ...]:
        """The sizes of the axes with a role. Axes of a window are contracted, so they count as "in" too."""
        return tuple(n for n, r in zip(self.shape, self.roles, strict=True) if role in (r, matrix_side(r)))

    @property
    def max_rank(self) -> int:
        """The largest rank that an update of this weight can have; 0 if it has no matrix form."""
        return min(math.prod(self.sizes("in")), math.prod(self.sizes("out"))) if self.roles else 0

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and copy keep: all but the sharding, whose devices belong to this process."""
        return {**self.__dict__, "sharding": None}

    @property
    def is_lookup(self) -> bool:
        """Whether the program's first use of the weight reads rows of it, as an embedding does."""
        return next((use.is_lookup for use in self.uses if use.roles), False)

    @property
    def is_product(self) -> bool:
        """Whether a product or a convolution consumes the weight."""
        return self.unsupported_reason == "" and any(use.roles and not use.is_lookup for use in self.uses)

    @property
    def flops(self) -> float:
        """FLOPs of one forward pass in this weight's products."""
        return sum(use.flops for use in self.uses)

    @property
    def is_trainable(self) -> bool:
        """Whether an update could change what the program computes: a floating-point weight that the program uses."""
        return bool(self.uses) and bool(jnp.issubdtype(self.dtype, jnp.floating))

    @property
    def unsupported_reason(self) -> str:
        """Why a low-rank method cannot adapt the weight; empty if it can."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            return f"its dtype is {self.dtype}, and only floating-point weights can be adapted"
        if not self.uses:
            return "the program does not use it"
        if not self.roles:
            primitives = ", ".join(sorted({use.primitive for use in self.uses}))
            if any(use.is_product for use in self.uses):
                return f"it takes the place of the activation wherever it is multiplied ({primitives})"
            return f"no product, convolution or lookup uses it (only {primitives})"
        if not {"in", "out"} <= set(map(matrix_side, self.roles)):
            return f"its axes are all {self.roles[0]!r}, so it has no low-rank form"
        return ""
