"""The law of banks: every member equals its own adapted program, for every kind of weight and every method."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.law.test_law import BOUNDS, EIGHT
from tests.support.draw import drawn
from tests.support.methods import METHODS, fitting, some
from tests.support.weight_uses import KINDS, Kind

BY_NAME = {kind.name: kind for kind in KINDS}


def members(kind: Kind, params: Any, x: Any, methods: list[Any]) -> dict[str, Any]:
    """One adapter for each method, with random numbers in all factors."""
    sites, rng, adapters = jlora.trace(kind.use, params, x), np.random.default_rng(3), {}
    for k, method in enumerate(methods):
        targets = {path: fitting(method, sites[path]) if isinstance(method, str) else method for path in kind.weights}
        shapes = jax.eval_shape(lambda targets=targets: jlora.init(jax.random.key(0), sites, targets, params=params))
        adapters[f"member {k}"] = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), s.dtype), shapes)
    return adapters


def hold(kind: Kind, methods: list[Any]) -> None:
    """Values and gradients of a bank in one program, against those of every adapter in its own."""
    params, x = kind.values(np.random.default_rng(7))
    adapters = members(kind, params, x, methods)
    bank = jlora.bank.stack(adapters, params=params)
    batches = jax.tree.map(lambda a: np.stack([a] * len(adapters)), x)
    adapted = jlora.adapt(kind.use, on_dense="allow")
    together = jlora.bank.vmap(kind.use, on_dense="allow")

    def total(bank: Any) -> tuple[Any, Any]:
        out = together(params, bank, batches)
        return sum((jnp.nan_to_num(jnp.abs(leaf)) ** 2).sum() for leaf in jax.tree.leaves(out)), out

    def alone(adapter: Any) -> tuple[Any, Any]:
        out = adapted(params, adapter, x)
        return sum((jnp.nan_to_num(jnp.abs(leaf)) ** 2).sum() for leaf in jax.tree.leaves(out)), out

    def both(bank: Any) -> Any:
        (_, out), gradient = jax.value_and_grad(total, has_aux=True)(bank)
        own = {name: jax.value_and_grad(alone, has_aux=True)(adapter) for name, adapter in adapters.items()}
        return out, gradient, own

    out, gradient, own = jax.jit(both)(bank)
    bound = BOUNDS["bfloat16" if kind.coarse else "float32"]
    for k, name in enumerate(bank):
        (_, want), own_gradient = own[name]
        close(jax.tree.map(lambda leaf, k=k: leaf[k], out), want, bound)
        one = jax.tree.map(lambda leaf, k=k: leaf[k], gradient.adapter)
        for path, update in own_gradient.items():
            for factor, expected in update.factors.items():
                value = one[path].factors[factor]
                close(value[tuple(slice(n) for n in expected.shape)], expected, bound)


def close(value: Any, want: Any, bound: float) -> None:
    """Within a bound relative to the largest entry; NaN, of rows that do not exist, at the same places."""
    size = max(float(jnp.nanmax(jnp.abs(leaf))) for leaf in jax.tree.leaves(want))
    for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=bound * max(size, 1e-6))


def in_default_run(kind: Kind) -> bool:
    return kind.name in EIGHT or drawn("bank", kind.name, one_in=8)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=kind.name, marks=[] if in_default_run(kind) else [pytest.mark.nightly])
        for kind in KINDS
        if not kind.limited
    ],
)
def test_kinds(kind: Kind) -> None:
    """Ranks and scales differ; every kind of weight."""
    ranks = [jlora.LoRA(1, alpha=2.0), jlora.LoRA(2, alpha=3.0, rank_stabilized=True), "lora"]
    hold(kind, ranks)


def is_default(name: str, kind: str) -> bool:
    return kind == "mlp" and (name in ("dora", "ia3", "lora_offset") or drawn("bank", name, one_in=5))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=[] if is_default(name, kind) else [pytest.mark.nightly])
        for name in METHODS
        for kind in ("mlp", "scan_stacked", "conv_2d", "experts", "tied_embedding")
    ],
)
def test_methods(name: str, kind: str) -> None:
    """Members of one method, in the method's own form."""
    hold(BY_NAME[kind], [name, name])


@pytest.mark.parametrize("name", some("scale of zero", "lora", "dora", "ia3"))
def test_a_scale_of_zero_is_the_base(name: str) -> None:
    """A member that lacks a weight has a scale of zero there, which is the base for every method."""
    kind = BY_NAME["mlp"]
    params, x = jax.tree.map(jnp.asarray, kind.values(np.random.default_rng(7)))
    (adapter,) = members(kind, params, x, [name]).values()
    bank = jlora.bank.stack({"all": adapter, "none": {}}, params=params)
    out = jax.jit(jlora.bank.vmap(kind.use, (None,), on_dense="allow"))(params, bank, x)
    np.testing.assert_allclose(out[1], kind.use(params, x), rtol=2e-5, atol=2e-5)
    assert np.abs(out[0] - out[1]).max() > 1e-4
    assert bank["none"] == {}
