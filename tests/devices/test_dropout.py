"""Dropout inside a program's own `shard_map` or `pmap`: a mask for each input, not for each device.

Every device has the identity as its input, so that a column of its result is the mask. Entry (d, m) of a result is the
mask of the device at that place of a 4 x 2 mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.extend import treat_as

Body = Callable[[jax.Array, jax.Array], jax.Array]
RATE, WIDTH, SHAPE = 0.25, 32, (4, 2)
PARAMS = {"w": jnp.zeros((WIDTH, 2))}
BOTH = frozenset("dm")
VARYING = {"none": frozenset(), "d": frozenset("d"), "m": frozenset("m"), "both": BOTH}
SPECS = {"none": P(), "d": P("d"), "m": P("m"), "both": P(("d", "m"))}


def mesh_of(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(SHAPE, ("d", "m"), axis_types=(kind,) * 2)


def program(body: Body, spec: P, *, kind: AxisType = AxisType.Auto, check_vma: bool = True) -> Any:
    """A column-parallel product by hand: the weight is split along `m`, the input as `spec` tells."""
    return jax.shard_map(
        lambda p, x: body(x, p["w"]),
        mesh=mesh_of(kind),
        in_specs=({"w": P(None, "m")}, spec),
        out_specs=P(("d", "m")),
        check_vma=check_vma,
    )


def identities(axes: frozenset[str]) -> jax.Array:
    count = int(np.prod([n for n, name in zip(SHAPE, "dm", strict=True) if name in axes]))
    return jnp.tile(jnp.eye(WIDTH), (count, 1))


def ones(fun: Any, x: jax.Array, params: Any = PARAMS) -> jlora.Adapter:
    one = jax.nn.initializers.ones
    return jlora.init(
        jax.random.key(0), jlora.trace(fun, params, x), jlora.LoRA(1, dropout=RATE, a_init=one, b_init=one)
    )


def masks_of(fun: Any, x: jax.Array, params: Any = PARAMS) -> np.ndarray:
    """The mask of every device: 1 for an entry that was kept."""
    keyed = jlora.with_dropout(ones(fun, x, params), jax.random.key(1))
    scaled = np.asarray(jax.jit(jlora.adapt(fun, on_dense="error"))(params, keyed, x))
    assert {0.0, np.float32(1 / (1 - RATE))} == set(np.unique(scaled).tolist())
    return (scaled > 0).reshape(*SHAPE, WIDTH)


def assert_masks_vary(masks: np.ndarray, axes: frozenset[str]) -> None:
    """Masks differ between any two devices with different inputs, and are equal on those with the same input."""
    for k, name in enumerate("dm"):
        first = np.take(masks, [0], axis=k)
        if name not in axes:
            np.testing.assert_array_equal(masks, np.broadcast_to(first, masks.shape))
    different = {mask.tobytes() for mask in masks.reshape(-1, WIDTH)}
    assert len(different) == np.prod([n for n, name in zip(SHAPE, "dm", strict=True) if name in axes])


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return (x @ w)[:, 0]


def in_loop(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.scan(lambda x, _: (x, product(x, w)), x, None, length=2)[1][1]


def in_while(x: jax.Array, w: jax.Array) -> jax.Array:
    step = lambda state: (state[0] + 1, state[1], product(state[1], w))  # noqa: E731
    return lax.while_loop(lambda state: state[0] < 2, step, (0, x, 0 * product(x, w)))[2]


def carried(x: jax.Array, w: jax.Array) -> jax.Array:
    """A carry that is the same everywhere at first, and differs from the second step on."""
    step = lambda c, _: (x, product(c, w))  # noqa: E731
    return lax.scan(step, jnp.eye(WIDTH), None, length=2)[1][1]


def in_branch(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.cond(x.sum() > 0, product, lambda x, w: -product(x, w), x, w)


def nested(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.jit(jax.checkpoint(product))(x, w)


def gathered(x: jax.Array, w: jax.Array) -> jax.Array:
    return product(lax.all_gather(x, "d", tiled=True)[:WIDTH], w)


def averaged(x: jax.Array, w: jax.Array) -> jax.Array:
    return product(lax.pmean(x, "d"), w)


def scattered(x: jax.Array, w: jax.Array) -> jax.Array:
    wide = jnp.tile(x, (SHAPE[0], 1)) / SHAPE[0]
    return product(lax.psum_scatter(wide, "d", tiled=True), w)


def by_position(x: jax.Array, w: jax.Array) -> jax.Array:
    return product(x + 0 * lax.axis_index("m").astype(x.dtype), w)


def by_kernel(x: jax.Array, w: jax.Array) -> jax.Array:
    matmul = lambda x, w: x @ w  # noqa: E731
    return treat_as(matmul, matmul)(x, w)[:, 0]


def convolution(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x[:, None], w[None], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))[
        :, 0, 0
    ]


CASES = [
    *((product, name, VARYING[name]) for name in SPECS),
    *((body, "d", VARYING["d"]) for body in (in_loop, in_while, in_branch, nested, scattered, convolution)),
    (by_kernel, "both", BOTH),
    (gathered, "d", VARYING["none"]),
    (averaged, "both", VARYING["m"]),
    (by_position, "d", BOTH),
]


@pytest.mark.drawn(3)
@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.nightly), False], ids=["typed", "untyped"])
@pytest.mark.parametrize(("body", "spec", "varying"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_masks_differ_between_inputs_and_not_between_copies(
    body: Body, spec: str, varying: frozenset[str], check_vma: bool
) -> None:
    fun = program(body, SPECS[spec], check_vma=check_vma)
    assert_masks_vary(masks_of(fun, identities(VARYING[spec])), varying)


def test_a_copy_that_its_type_calls_varying() -> None:
    """A product casts its input to vary along the axis of the weight; all devices of that axis have the same input."""
    fun = program(product, P("d"))
    assert_masks_vary(masks_of(fun, identities(VARYING["d"])), VARYING["d"])


def test_a_carry_that_differs_later() -> None:
    fun = program(carried, P("d"), check_vma=False)
    assert_masks_vary(masks_of(fun, identities(VARYING["d"])), VARYING["d"])


def test_explicit_meshes() -> None:
    fun = program(product, P("d"), kind=AxisType.Explicit)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(identities(VARYING["d"]), NamedSharding(mesh, P("d")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P(None, "m")))
        assert_masks_vary(masks_of(fun, x, params), VARYING["d"])


def test_an_axis_that_the_compiler_divides() -> None:
    """One axis of the mesh is manual; along the other one the compiler divides the program."""

    def body(p: Any, x: jax.Array) -> jax.Array:
        return product(x, p["w"])

    fun = jax.shard_map(body, mesh=mesh_of(), in_specs=(P(), P("d")), out_specs=P("d"), axis_names={"d"})
    x = identities(VARYING["d"])
    keyed = jlora.with_dropout(ones(fun, x), jax.random.key(1))
    masks = np.asarray(jax.jit(jlora.adapt(fun))(PARAMS, keyed, x)).reshape(SHAPE[0], WIDTH)
    assert len({mask.tobytes() for mask in masks}) == SHAPE[0]


def test_inside_another_shard_map() -> None:
    """The outer one divides the input along one axis, the inner one along the other."""

    def outer(p: Any, x: jax.Array) -> jax.Array:
        inner = jax.shard_map(
            lambda x, w: product(x, w), in_specs=(P("m"), P()), out_specs=P("m"), axis_names={"m"}, check_vma=True
        )
        return inner(x, p["w"])

    mesh = mesh_of()
    fun = jax.shard_map(outer, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"), axis_names={"d"})
    x = identities(BOTH)
    with jax.set_mesh(mesh):
        assert_masks_vary(masks_of(fun, x), BOTH)


@pytest.mark.parametrize(("in_axis", "different"), [(0, 8), (None, 1)])
def test_pmap(in_axis: int | None, different: int) -> None:
    mapped = jax.pmap(lambda p, x, k: product(x, p["w"]) + k, in_axes=(None, in_axis, 0))
    fun = lambda p, x: mapped(p, x, jnp.zeros(8))  # noqa: E731
    x = jnp.stack([jnp.eye(WIDTH)] * 8) if in_axis == 0 else jnp.eye(WIDTH)
    keyed = jlora.with_dropout(ones(fun, x), jax.random.key(1))
    masks = np.asarray(jlora.adapt(fun)(PARAMS, keyed, x))
    assert len({mask.tobytes() for mask in masks}) == different


def test_a_vmap_with_an_axis_name_has_one_mask_for_its_whole_input() -> None:
    """As without `vmap`: each row of the mapped input has entries of its own."""
    fun = jax.vmap(lambda p, x: product(x + 0 * lax.axis_index("i").astype(x.dtype), p["w"]), (None, 0), axis_name="i")
    x = jnp.stack([jnp.eye(WIDTH)] * 8)
    keyed = jlora.with_dropout(ones(fun, x), jax.random.key(1))
    assert len({mask.tobytes() for mask in np.asarray(jlora.adapt(fun)(PARAMS, keyed, x))}) == 8


def test_replicas_of_a_result_are_equal() -> None:
    """A result that the program calls replicated is the same on every device, to the bit."""
    fun = jax.shard_map(lambda p, x: x @ p["w"], mesh=mesh_of(), in_specs=(P(), P()), out_specs=P(), check_vma=False)
    x = jax.random.normal(jax.random.key(2), (WIDTH, WIDTH))
    keyed = jlora.with_dropout(ones(fun, x), jax.random.key(1))
    y = jax.jit(jlora.adapt(fun))(PARAMS, keyed, x)
    copies = {np.asarray(shard.data).tobytes() for shard in y.addressable_shards}
    assert (len(y.addressable_shards), len(copies)) == (8, 1)


@pytest.mark.parametrize("check_vma", [pytest.param(True, marks=pytest.mark.nightly), False], ids=["typed", "untyped"])
def test_the_gradient_is_that_of_the_same_masks(check_vma: bool) -> None:
    """y = ((m * x) / (1 - p)) A B, so dA = ((m * x) / (1 - p))^T g B^T and dB = (((m * x) / (1 - p)) A)^T g."""
    fun = jax.shard_map(
        lambda p, x: x @ p["w"],
        mesh=mesh_of(),
        in_specs=({"w": P(None, "m")}, P("d")),
        out_specs=P("d", "m"),
        check_vma=check_vma,
    )
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (4 * WIDTH, WIDTH))
    g = jax.random.normal(keys[1], (4 * WIDTH, 2))
    adapter = jax.tree.map(lambda a: a + jax.random.normal(keys[2], a.shape), ones(fun, x))

    def output(adapter: Any, x: jax.Array) -> jax.Array:
        return jlora.adapt(fun)(PARAMS, jlora.with_dropout(adapter, jax.random.key(1)), x)

    # With one entry of a row at a time, the result is the mask: one product for each column of the input.
    unit = ones(fun, x)
    column = jax.jit(lambda k: output(unit, jnp.zeros_like(x).at[:, k].set(1))[:, 0])
    scaled = np.stack([column(k) for k in range(WIDTH)], axis=1)
    dropped = scaled * np.asarray(x)
    a, b = (np.asarray(adapter["w"].factors[name]) for name in "ab")
    np.testing.assert_allclose(jax.jit(output)(adapter, x), dropped @ a @ b, rtol=1e-4, atol=1e-4)
    gradient = jax.jit(jax.grad(lambda adapter: (output(adapter, x) * g).sum()))(adapter)["w"].factors
    np.testing.assert_allclose(gradient["a"], dropped.T @ np.asarray(g) @ b.T, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(gradient["b"], (dropped @ a).T @ np.asarray(g), rtol=1e-4, atol=1e-3)


def test_the_expectation_is_the_program_without_dropout() -> None:
    fun = program(product, P("d"))
    x = identities(VARYING["d"])
    adapter = ones(fun, x)
    run = jax.jit(lambda key: jlora.adapt(fun)(PARAMS, jlora.with_dropout(adapter, key), x))
    mean = np.mean([run(jax.random.key(k)) for k in range(100)], axis=0)
    deviation = (RATE / (1 - RATE) / 100) ** 0.5
    np.testing.assert_allclose(mean, 1, atol=5 * deviation)
    np.testing.assert_allclose(mean.mean(), 1, atol=5 * deviation / mean.size**0.5 * 2**0.5)  # copies along `m`
