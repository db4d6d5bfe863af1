"""Programs on eight devices, with the shardings of weights and inputs: for `tests/devices/test_meshes.py`.

Every program runs on meshes of `AxisType.Auto` axes and on those of `AxisType.Explicit` ones. There it says
of a product that leaves a choice how its result lies, and gathers by `reshard` what is to be gathered.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

Tree = Any
BATCH, TIME, WIDTH, HIDDEN, LAYERS, EXPERTS = 8, 16, 32, 48, 8, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """One program on one mesh.

    Arguments:
        name: of the layout.
        fun: `fun(params, x) -> y`.
        shape: of the mesh.
        axes: the names of its axes.
        sizes: of the weights, by path.
        specs: where the weights lie.
        x: the size of the input.
        x_spec: where the input lies.
        plain: the same function, written for one device.
    """

    name: str
    fun: Callable[[Tree, jax.Array], jax.Array]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    sizes: dict[str, tuple[int, ...]]
    specs: dict[str, P]
    x: tuple[int, ...]
    x_spec: P
    plain: Callable[[Tree, jax.Array], jax.Array]

    def mesh(self, kind: AxisType) -> Mesh:
        return jax.make_mesh(self.shape, self.axes, axis_types=(kind,) * len(self.axes))

    def values(self) -> tuple[Tree, np.ndarray]:
        """Weights and inputs of one host."""
        rng = np.random.default_rng(0)
        params = {k: rng.normal(size=n).astype(np.float32) / n[-2] ** 0.5 for k, n in self.sizes.items()}
        return params, rng.normal(size=self.x).astype(np.float32)

    def shardings(self, mesh: Mesh) -> tuple[Tree, NamedSharding]:
        return {k: NamedSharding(mesh, spec) for k, spec in self.specs.items()}, NamedSharding(mesh, self.x_spec)

    def abstract(self, mesh: Mesh) -> tuple[Tree, jax.ShapeDtypeStruct]:
        """Weights and inputs that are nowhere yet, with their places."""
        places, place = self.shardings(mesh)
        params = {k: jax.ShapeDtypeStruct(n, jnp.float32, sharding=places[k]) for k, n in self.sizes.items()}
        return params, jax.ShapeDtypeStruct(self.x, jnp.float32, sharding=place)


def _is_explicit(a: jax.Array) -> bool:
    return AxisType.Explicit in jax.typeof(a).sharding.mesh.axis_types


def there(a: jax.Array, *spec: Any) -> jax.Array:
    """The array in a place, where types say places."""
    return reshard(a, P(*spec)) if _is_explicit(a) else a


def product(letters: str, a: jax.Array, w: jax.Array, *spec: Any) -> jax.Array:
    """A product whose result lies in a place, where types say places."""
    return jnp.einsum(letters, a, w, out_sharding=P(*spec) if _is_explicit(a) else None)


def block(data: Any = None, model: Any = None, gathered: bool = False) -> Callable[[Tree, jax.Array], jax.Array]:
    """A feed-forward block: a column-parallel product, and a row-parallel one."""

    def fun(p: Tree, x: jax.Array) -> jax.Array:
        up = there(p["up"], None, model) if gathered else p["up"]
        down = there(p["down"], model, None) if gathered else p["down"]
        h = jnp.tanh(product("btd,df->btf", x, up, data, None, model))
        return x + product("btf,fd->btd", h, down, data, None, None)

    return fun


def attention(p: Tree, x: jax.Array) -> jax.Array:
    """Each device has a part of the sequence; keys and values are gathered."""
    query, key, value = (
        product("btd,de->bte", x, p[name], None, "sequence", None) for name in ("query", "key", "value")
    )
    key, value = (there(a, None, None, None) for a in (key, value))
    scores = jax.nn.softmax(product("bqe,bke->bqk", query, key, None, "sequence", None) / WIDTH**0.5)
    return x + product("btd,de->bte", product("bqk,bke->bqe", scores, value), p["out"], None, "sequence", None)


def experts(p: Tree, x: jax.Array) -> jax.Array:
    """Each device has an expert, and the rows that were sent to it."""
    h = jnp.tanh(product("ecd,edf->ecf", x, p["up"], "expert", None, None))
    return product("ecf,efd->ecd", h, p["down"], "expert", None, None)


def pipeline(p: Tree, x: jax.Array) -> jax.Array:
    """Each device has a layer; a scan goes through them."""
    up, down = there(p["up"], None), there(p["down"], None)
    step = lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None)  # noqa: E731
    return lax.scan(step, x, (up, down))[0]


# The same by hand, in `jax.shard_map`.


def manual(specs: dict[str, P], x: P) -> Callable[..., Callable[[Tree, jax.Array], jax.Array]]:
    """Runs a function of local pieces under `jax.shard_map`, on the mesh that is set."""
    return lambda fun: lambda p, a: jax.shard_map(fun, in_specs=({k: specs[k] for k in p}, x), out_specs=x)(p, a)


BLOCK = {"up": P("data", "model"), "down": P("model", "data")}
EXPERT = {"up": P("expert"), "down": P("expert")}
PIPE = {"up": P("pipe"), "down": P("pipe")}
SQUARE: dict[str, P] = {name: P() for name in ("query", "key", "value", "out")}


@manual(BLOCK, P("data"))
def manual_block(p: Tree, x: jax.Array) -> jax.Array:
    """Weights are gathered over one axis of the mesh, and a sum goes over the other."""
    up, down = (
        lax.all_gather(p["up"], "data", axis=0, tiled=True),
        lax.all_gather(p["down"], "data", axis=1, tiled=True),
    )
    return x + lax.psum(jnp.tanh(x @ up) @ down, "model")


@manual(SQUARE, P(None, "sequence"))
def manual_attention(p: Tree, x: jax.Array) -> jax.Array:
    key, value = (lax.all_gather(x @ p[name], "sequence", axis=1, tiled=True) for name in ("key", "value"))
    scores = jax.nn.softmax(jnp.einsum("bqe,bke->bqk", x @ p["query"], key) / WIDTH**0.5)
    return x + jnp.einsum("bqk,bke->bqe", scores, value) @ p["out"]


@manual(EXPERT, P(None, "expert"))
def manual_experts(p: Tree, x: jax.Array) -> jax.Array:
    """Every device has rows for all experts: they are sent there and back."""
    x = lax.all_to_all(x, "expert", 0, 1, tiled=True)
    x = experts(p, x)
    return lax.all_to_all(x, "expert", 1, 0, tiled=True)


@manual(PIPE, P())
def manual_pipeline(p: Tree, x: jax.Array) -> jax.Array:
    """Each device runs its layer on one row of the batch after the other, and hands it on to the next."""
    count, here = lax.axis_size("pipe"), lax.axis_index("pipe")
    last = here == count - 1

    def tick(carry: tuple[jax.Array, jax.Array], k: jax.Array) -> tuple[Any, None]:
        arrived, done = carry
        row = jnp.where(here == 0, x[jnp.minimum(k, BATCH - 1)], arrived)
        row = row + jnp.tanh(row @ p["up"][0]) @ p["down"][0]
        at = jnp.maximum(k - count + 1, 0)
        done = jnp.where(last, done.at[at].set(row), done)
        return (lax.ppermute(row, "pipe", [(j, (j + 1) % count) for j in range(count)]), done), None

    start = lax.pcast((jnp.zeros_like(x[0]), jnp.zeros_like(x)), ("pipe",), to="varying")
    (_, done), _ = lax.scan(tick, start, jnp.arange(BATCH + count - 1))
    return lax.psum(jnp.where(last, done, jnp.zeros_like(done)), "pipe")


@functools.partial(jax.pmap, in_axes=(None, 0))
def mapped_block(p: Tree, x: jax.Array) -> jax.Array:
    return block()(p, x)


SIZES = {
    "block": {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)},
    "expert": {"up": (EXPERTS, WIDTH, HIDDEN), "down": (EXPERTS, HIDDEN, WIDTH)},
    "pipe": {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)},
    "square": dict.fromkeys(SQUARE, (WIDTH, WIDTH)),
}
ROWS, SENT = (BATCH, TIME, WIDTH), (EXPERTS, BATCH, WIDTH)


def _of(name: str, fun: Any, mesh: dict[str, int], sizes: str, specs: dict[str, P], x: P, plain: Any) -> Layout:
    rows = SENT if sizes == "expert" else ROWS
    return Layout(name, fun, tuple(mesh.values()), tuple(mesh), SIZES[sizes], specs, rows, x, plain)


BOTH = {"data": 4, "model": 2}
WHOLE = {"up": P(), "down": P()}
BY_ROW = {"up": P("data"), "down": P(None, "data")}
BY_COLUMN = {"up": P(None, "model"), "down": P("model")}

LAYOUTS = [
    _of("data", block("data"), {"data": 8}, "block", WHOLE, P("data"), block()),
    _of("fsdp", block("data", gathered=True), {"data": 8}, "block", BY_ROW, P("data"), block()),
    _of("tensor", block(None, "model"), {"model": 8}, "block", BY_COLUMN, P(), block()),
    _of("fsdp_x_tensor", block("data", "model", gathered=True), BOTH, "block", BLOCK, P("data"), block()),
    _of("sequence", attention, {"sequence": 8}, "square", SQUARE, P(None, "sequence"), attention),
    _of("expert", experts, {"expert": 8}, "expert", EXPERT, P("expert"), experts),
    _of("pipeline", pipeline, {"pipe": 8}, "pipe", PIPE, P(), pipeline),
]
MANUAL = [
    _of("manual_fsdp_x_tensor", manual_block, BOTH, "block", BLOCK, P("data"), block()),
    _of("manual_sequence", manual_attention, {"sequence": 8}, "square", SQUARE, P(None, "sequence"), attention),
    _of("manual_expert", manual_experts, {"expert": 8}, "expert", EXPERT, P(None, "expert"), experts),
    _of("manual_pipeline", manual_pipeline, {"pipe": 8}, "pipe", PIPE, P(), pipeline),
]
