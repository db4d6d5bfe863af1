"""Numbers for a random program: parameters, adapters and inputs, their placement, and noise of their precision."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jlora
from tests.support import weight_uses
from tests.support.campaign.draw import Built
from tests.support.campaign.plan import Draw, Plan
from tests.support.int8_rows import rounded
from tests.support.methods import METHODS

Tree = Any


def values(plan: Plan, built: Built) -> tuple[Tree, Tree]:
    """Parameters and inputs. Narrow ones are positive half of the time, so that not all sums cancel."""
    rng = np.random.default_rng(plan.seed)
    positive = plan.dtype != "float32" and plan.seed % 2

    def normal(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        a = 0.6 * rng.normal(size=shape)
        return np.asarray(np.abs(a) + 0.1 if positive else a, np.float32).astype(dtype)

    params = {name: normal((*built.copies, *w.shape), w.dtype) for name, w in built.scope.params.items()}
    if plan.quantized:
        params = {name: rounded(a) if name in plan.shapes else a for name, a in params.items()}
    inputs = built.scope.inputs
    x = {name: v if isinstance(v, np.ndarray) else normal(v.shape, v.dtype) for name, v in inputs.items()}
    if plan.placement is None:
        return jax.tree.map(jnp.asarray, (params, x))
    r, mesh = random.Random(plan.placement), mesh_of(plan)
    return jax.tree.map(lambda a: jax.device_put(a, _placed(r, mesh, a.shape)), (params, x))


def mesh_of(plan: Plan) -> Mesh:
    """The devices of a plan that is placed."""
    mesh = weight_uses.mesh()
    return jax.make_mesh((4, 2), mesh.axis_names, axis_types=(AxisType.Explicit,) * 2) if plan.explicit else mesh


def _placed(r: random.Random, mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """A random sharding that divides the shape."""
    spec: list[Any] = [None] * len(shape)
    for axis, count in (("data", 4), ("model", 2)):
        options = [k for k, n in enumerate(shape) if n % count == 0 and n and spec[k] is None]
        if options and r.random() < 0.7:
            spec[r.choice(options)] = axis
    return NamedSharding(mesh, PartitionSpec(*spec))


def targets(plan: Plan, draw: Draw, sites: jlora.Sites) -> dict[str, jlora.Method]:
    """For every weight that can be adapted a method, with random hyper-parameters; some other parameters get `Full`."""
    r = random.Random(draw.seed)
    chosen: dict[str, jlora.Method] = {}
    for path, site in sites.items():
        if path not in plan.shapes:
            if site.is_trainable and r.random() < 0.15:
                chosen[path] = jlora.Full()
            continue
        fitting = [_varied(r, m) for name in (draw.name, "lora_of_rank_1") for m in METHODS[name]]
        options = [m for m in fitting if not m.unsupported_reason(site)]
        if options and r.random() < 0.9:
            chosen[path] = options[0]
        elif site.is_trainable and r.random() < 0.5:
            chosen[path] = jlora.Full()
    return chosen


def _varied(r: random.Random, method: jlora.Method) -> jlora.Method:
    """The method with other hyper-parameters, those that all weights take."""
    fields = {field.name for field in dataclasses.fields(method)}
    options: dict[str, Any] = {
        "rank": [getattr(method, "rank", None)] * 2 + ([1, 3, 4] if type(method) in (jlora.LoRA, jlora.DoRA) else []),
        "alpha": [1.0, 2.5, 3.0] if getattr(method, "rank", None) else [getattr(method, "alpha", None)],
        "rank_stabilized": [False, True],
        "seed": [0, 1, 9],
    }
    changes = {name: r.choice(values) for name, values in options.items() if name in fields}
    return dataclasses.replace(method, **changes)


def adapters(plan: Plan, sites: jlora.Sites, params: Tree, lead: tuple[int, ...]) -> list[Any]:
    """Adapters of random numbers, stacked along the leading axes. Those without targets are left out."""
    rng = np.random.default_rng(plan.seed + 1)
    made = []
    for draw in plan.methods:
        chosen = targets(plan, draw, sites)
        if chosen:
            shapes = jax.eval_shape(lambda chosen=chosen: jlora.init(jax.random.key(0), sites, chosen, params=params))
            made.append(jax.tree.map(lambda s: jnp.asarray(_signed(rng, (*lead, *s.shape)), s.dtype), shapes))
    return made


def _signed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers whose size is from 0.2 to 0.8."""
    return rng.uniform(0.2, 0.8, shape) * rng.choice([-1.0, 1.0], shape)


def noisy(tree: Tree, seed: int, eps: float) -> Tree:
    """The same numbers, each off by a rounding: of its own dtype, or of a relative `eps` if that is larger."""
    rng = np.random.default_rng(seed)

    def noise(a: Any) -> Any:
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        own = max(eps, float(jnp.finfo(a.dtype).eps))
        off = 1 + own * rng.choice([-1.0, 1.0], a.shape)
        new = jnp.asarray((np.asarray(a, np.float32) * off).astype(np.float32)).astype(a.dtype)
        return jax.device_put(new, a.sharding) if isinstance(a.sharding, NamedSharding) else new

    return jax.tree.map(noise, tree)
