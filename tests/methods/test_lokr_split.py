"""How LoKr splits a size by its factor: as LyCORIS and PEFT do, and as adapters were saved before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model
from tests.support.checkpoints import GOLDEN

# For a size and a factor (major, minor) of LyCORIS 4.1.3 and of PEFT 0.21.2, and that of adapters saved before.
SPLITS = {
    (64, -1): ((8, 8), (8, 8), (8, 8)),
    (20, -1): ((4, 5), (4, 5), (4, 5)),
    (20, 8): ((4, 5), (4, 5), (5, 4)),
    (64, 20): ((8, 8), (8, 8), (16, 4)),
    (20, 10): ((2, 10), (10, 2), (10, 2)),
    (20, 20): ((1, 20), (20, 1), (20, 1)),
    (12, 5): ((3, 4), (3, 4), (4, 3)),
    (127, 16): ((1, 127), (1, 127), (1, 127)),
    (360, 16): ((15, 24), (15, 24), (15, 24)),
    (360, 8): ((8, 45), (8, 45), (8, 45)),
    (3, 7): ((1, 3), (1, 3), (3, 1)),
}


def product(params, x):
    return x @ params["w"]


def test_the_split_of_each_rule():
    weights = {f"{size} by {factor}": jnp.ones((size, 6)) for size, factor in SPLITS}
    sites = jlora.trace(lambda params: [jnp.ones(w.shape[0]) @ w for w in params.values()], weights)
    for number, split in enumerate(("lycoris", "peft", "divisor")):
        targets = {f"{size} by {factor}": jlora.LoKr(None, factor=factor, split=split) for size, factor in SPLITS}
        made = jax.eval_shape(lambda targets=targets: jlora.init(jax.random.key(0), sites, targets))
        actual = {path: (u.factors["c"].shape[0], u.factors["d"].shape[0]) for path, u in made.items()}
        assert actual == {f"{size} by {factor}": splits[number] for (size, factor), splits in SPLITS.items()}


def test_the_default_is_a_kronecker_product_of_the_split_of_lycoris():
    x = jnp.ones((2, 12))
    sites = jlora.trace(product, {"w": jnp.ones((12, 20))}, x)
    adapter = toy_model.random_adapter(sites, jlora.LoKr(None, factor=8))
    c, d = (np.asarray(adapter["w"].factors[name]) for name in "cd")
    assert (c.shape, d.shape) == ((3, 4), (4, 5))
    merged = jlora.merge({"w": jnp.zeros((12, 20))}, adapter)["w"]
    np.testing.assert_allclose(merged, np.kron(c, d), rtol=1e-5, atol=1e-6)


def test_a_saved_adapter_keeps_its_split():
    """An adapter of `LoKr(None, factor=8)` for 12 x 20 that an earlier release saved: C is 6 x 5, D 2 x 4."""
    adapter = jlora.load(GOLDEN / "lokr")
    c, d = (np.asarray(adapter["w"].factors[name]) for name in "cd")
    assert (c.shape, d.shape) == ((6, 5), (2, 4))
    base, x = {"w": jnp.zeros((12, 20))}, jnp.asarray(np.eye(12, dtype=np.float32))
    np.testing.assert_allclose(jlora.merge(base, adapter)["w"], np.kron(c, d), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jlora.adapt(product)(base, adapter, x), np.kron(c, d), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [10, 8, -1])
def test_peft_splits_what_is_saved_alike(factor, tmp_path):
    """PEFT puts a factor that divides a size first, so the file has the factor that gives jlora's split."""
    sites = jlora.trace(product, {"w": jnp.ones((12, 20))}, jnp.ones((2, 12)))
    adapter = toy_model.random_adapter(sites, jlora.LoKr(1, 3.0, factor))
    jlora.peft.save(tmp_path / "a", adapter, {"w": "layer"})
    again = jlora.peft.load(tmp_path / "a", sites, {"w": "layer"})
    base = {"w": jnp.zeros((12, 20))}
    np.testing.assert_array_equal(jlora.merge(base, again)["w"], jlora.merge(base, adapter)["w"])


def test_a_split_that_peft_does_not_have(tmp_path):
    sites = jlora.trace(product, {"w": jnp.ones((12, 20))}, jnp.ones((2, 12)))
    adapter = toy_model.random_adapter(sites, jlora.LoKr(1, 3.0, 7, split="divisor"))
    with pytest.raises(ValueError, match="by one decompose_factor, and none gives"):
        jlora.peft.save(tmp_path / "a", adapter, {"w": "layer"})
