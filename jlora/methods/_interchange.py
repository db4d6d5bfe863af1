"""What other libraries have to know to serialise updates: `jax.export`, and `flax.serialization` if a program uses it.

Flax is not imported here. If the program imports it later, updates are registered with it then.
"""

import dataclasses
import importlib.abc
import importlib.util
import json
import sys
from typing import Any

import jax
import jax.export

from jlora.methods._base import Update
from jlora.methods._description import describe_update, rebuild_method

_FLAX = "flax.serialization"
_ARRAYS = ("factors", "frozen", "initial", "rank_mask", "traced_scale")  # dropout keys are not stored


def register() -> None:
    """Registers updates: with `jax.export` now, with Flax as soon as the program has imported it."""
    jax.export.register_pytree_node_serialization(
        Update, serialized_name="jlora.Update", serialize_auxdata=_to_bytes, deserialize_auxdata=_from_bytes
    )
    if _FLAX in sys.modules:
        _register_with_flax(sys.modules[_FLAX])
    else:
        sys.meta_path.insert(0, _WhenFlaxIsImported())


def _to_bytes(static: tuple[Any, ...]) -> bytes:
    """The static fields of an update, in the order in which its class is registered as a pytree."""
    return describe_update(Update({}, *static[:3], scale=static[3])).encode()


def _from_bytes(data: bytes) -> tuple[Any, ...]:
    fields = json.loads(data)
    return rebuild_method(fields["method"]), tuple(fields["roles"]), tuple(fields["shape"]), fields["scale"]


class _WhenFlaxIsImported(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it has `flax.serialization` registered after its usual import."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _FLAX:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register_with_flax(module)

            spec.loader.exec_module = execute_and_register
        return spec


def _register_with_flax(serialization: Any) -> None:
    def to_state(update: Update) -> dict[str, Any]:
        arrays = {name: serialization.to_state_dict(getattr(update, name)) for name in _ARRAYS}
        return {"description": describe_update(update)} | arrays

    def from_state(update: Update, state: dict[str, Any]) -> Update:
        expected = describe_update(update)
        if state.get("description") != expected:
            raise ValueError(
                f"The update at {serialization.current_path()} is of another kind than that of the target. Expected "
                f"{expected}, found {state.get('description')}. Pass a target of the methods, scale and weights that "
                "were saved, or use jlora.save and jlora.load, which need no target."
            )
        arrays = {name: serialization.from_state_dict(getattr(update, name), state[name], name) for name in _ARRAYS}
        restored = dataclasses.replace(update, **arrays)
        shapes, new_shapes = ([getattr(a, "shape", None) for a in jax.tree.leaves(u)] for u in (update, restored))
        if shapes != new_shapes:
            raise ValueError(
                f"The update at {serialization.current_path()} has arrays of the shapes {new_shapes}; the target has "
                f"{shapes}. Pass a target that jlora.init made with the same hyper-parameters."
            )
        return restored

    serialization.register_serialization_state(Update, to_state, from_state)
