"""Parameters and checkpoints from which no names are found: the errors say what is nearest and what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quantized.nf4 import quantize
from tests.support.llama_layouts import LAYOUTS, D, L, llama, numbers, plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: jax.tree.map(lambda a: a + a.std() * numbers(*a.shape), p), "another model: of .*, 0 have a tensor"),
        (
            lambda p: jax.tree.map(lambda a: a * 1.001 + 1e-4 * numbers(*a.shape), p),
            r"differs from .* of its norm: was it trained",
        ),
        (lambda p: jax.tree.map(lambda a: a / 8, p), r"it is 0.125 times model.*: undo the scaling"),
        (lambda p: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), p), "is abstract"),
        (lambda p: p | {"k": quantize(jnp.ones((64, 64)), 0)}, "k is quantised"),
        (lambda p: {"n": 3}, "nothing to compare: 0 floating-point parameters"),
    ],
)
def test_params_that_are_refused(change, message):
    state = llama()
    with pytest.raises(ValueError, match=message):
        jlora.peft.infer_names(change(plain(state)), state)


def test_parameters_without_a_tensor(tmp_path):
    """A new head is reported, and refused when an adapter uses it."""
    state = llama()
    params = plain(state) | {"classifier": {"kernel": numbers(D, 5)}}
    names = jlora.peft.infer_names(params, state)
    assert set(names.unmatched) == {"classifier/kernel"}
    adapter = jlora.init(
        jax.random.key(0),
        jlora.trace(lambda p, x: x @ p["classifier"]["kernel"], params, np.ones((2, D), np.float32)),
        jlora.LoRA(2),
    )
    with pytest.raises(
        ValueError, match=r"classifier/kernel has no tensor in the checkpoint.*names \| {'classifier/kernel'"
    ):
        jlora.peft.save(tmp_path / "a", adapter, names)
    assert jlora.peft.save(tmp_path / "a", adapter, names | {"classifier/kernel": "score"}) == ()


@pytest.mark.parametrize("layout", ["rotary", "padded", "columns in turns"])
def test_layouts_that_no_entry_describes(layout, tmp_path):
    state = llama()
    params = LAYOUTS[layout](state)
    names = jlora.peft.infer_names(params, state)
    assert names.complete
    assert len(names.inexpressible) in (1, L)
    path = next(iter(names.inexpressible))
    weight = params
    for key in path.split("/"):
        weight = weight[int(key) if key.isdigit() else key]
    x = np.ones((2, weight.shape[0]), np.float32)
    sites = jlora.trace(lambda p, x: jnp.tensordot(x, p[path], 1), {path: weight}, x)
    with pytest.raises(ValueError, match=f"{path} has no entry for PEFT"):
        jlora.peft.save(tmp_path / "a", jlora.init(jax.random.key(0), sites, jlora.LoRA(2)), names)
