"""The five calls, with jlora as it is installed: run by `python -I` outside of the checkout."""

import importlib.metadata
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import jlora

assert Path(sys.prefix) in Path(jlora.__file__).parents, f"not the installed jlora: {jlora.__file__}"
assert jlora.__version__ == importlib.metadata.version("jlora")
assert (Path(jlora.__file__).parent / "py.typed").exists()


def f(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]) @ params["down"]


keys = jax.random.split(jax.random.key(0), 3)
params = {"up": jax.random.normal(keys[0], (8, 12)), "down": jax.random.normal(keys[1], (12, 4))}
x = jax.random.normal(keys[2], (5, 8))

adapter = jlora.init(keys[0], jlora.trace(f, params, x), jlora.LoRA(rank=2))
adapter = jax.tree.map(lambda factor: factor + 0.1, adapter)
y = jlora.adapt(f, on_dense="error")(params, adapter, x)
merged = f(jlora.merge(params, adapter), x)
assert jnp.abs(y - merged).max() <= 2e-5 * jnp.abs(merged).max()
assert jnp.abs(y - f(params, x)).max() > 1e-2

with tempfile.TemporaryDirectory() as folder:
    jlora.save(f"{folder}/adapter", adapter, params=params)
    loaded = jlora.load(f"{folder}/adapter", params=params)
assert jax.tree.structure(loaded) == jax.tree.structure(adapter)
assert all((a == b).all() for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(adapter), strict=True))

print(f"jlora {jlora.__version__} on JAX {jax.__version__}: {jlora.__file__}")
