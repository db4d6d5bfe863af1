"""The trainer of `google-tunix` trains an adapted module as it is; the test exists where tunix is installed."""

import importlib
import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora

TOKENS = np.arange(8)[:, None] + np.arange(10)
STEPS = 30
# The LoRA provider of tunix has no DoRA.
TARGETS = {r".*/(q|k|v|o)_proj/w": jlora.DoRA(4), r".*/mlp/.*/kernel": jlora.DoRA(4), "lm_head/w": jlora.DoRA(4)}

if importlib.util.find_spec("tunix"):

    @pytest.fixture(autouse=True)
    def settings_of_a_user():
        with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            warnings.simplefilter("ignore")
            yield

    def new_llama() -> Any:
        llama3 = importlib.import_module("tunix.models.llama3.model")
        sizes = {"num_layers": 2, "vocab_size": 32, "embed_dim": 16, "hidden_dim": 24}
        heads = {"num_heads": 4, "head_dim": 4, "num_kv_heads": 2, "rope_theta": 10_000, "norm_eps": 1e-5}
        model, rng = llama3.Llama3(llama3.ModelConfig(**sizes, **heads), rngs=nnx.Rngs(0)), np.random.default_rng(0)
        # Some of its weights start at zero, because it expects a checkpoint.
        numbers = jax.tree.map(lambda a: a + jnp.asarray(rng.normal(0, 0.2, a.shape), a.dtype), nnx.state(model))
        nnx.update(model, numbers)
        return model

    def new_trainer(model: Any, folder: str) -> Any:
        module = importlib.import_module("tunix.sft.peft_trainer")
        config = module.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS, checkpoint_root_directory=folder)
        return module.PeftTrainer(model, optax.adamw(5e-2), config).with_gen_model_input_fn(model_input)

    def model_input(batch: Any) -> dict[str, jax.Array]:
        count, length = batch.input_tokens.shape
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": jnp.broadcast_to(jnp.arange(length), (count, length)),
            "attention_mask": jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (count, length, length)),
        }

    def logits(model: Any) -> np.ndarray:
        positions = jnp.broadcast_to(jnp.arange(10), (8, 10))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((10, 10), bool)), (8, 10, 10))
        return np.asarray(nnx.jit(lambda m, *args: m(*args)[0])(model, jnp.asarray(TOKENS), positions, None, mask))

    def loss(model: Any) -> float:
        target = jax.nn.one_hot(TOKENS[:, 1:], 32)
        return float(optax.softmax_cross_entropy(logits(model)[:, :-1], target).mean())

    def test_the_trainer_of_tunix_trains_dora_on_its_llama(tmp_path: Any) -> None:
        plain = new_llama()
        before = jax.tree.map(jnp.copy, nnx.state(plain))
        model, other = (
            jlora.nnx.adapt(plain, TARGETS, **plain.get_model_input(), rngs=nnx.Rngs(seed)) for seed in (1, 2)
        )
        start = jlora.nnx.adapter(model)
        sft = importlib.import_module("tunix.sft.peft_trainer")
        batch = sft.TrainingInput(input_tokens=TOKENS, input_mask=np.ones_like(TOKENS))
        assert loss(model) == pytest.approx(loss(plain), rel=1e-5)
        with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2):
            new_trainer(model, str(tmp_path)).train([batch] * STEPS)
        assert loss(model) < 0.7 * loss(plain)
        np.testing.assert_allclose(logits(model), logits(jlora.nnx.merge(model)), rtol=1e-4, atol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, nnx.state(jlora.nnx.base(model)), before)
        adapter = jlora.nnx.adapter(model)
        assert len(adapter) == 15
        moved = jax.tree.map(lambda new, old: bool((new != old).any()), adapter, start)
        assert all(jax.tree.leaves(moved)), moved
        # What the trainer saved it restores into another adapted module.
        assert new_trainer(other, str(tmp_path)).train_steps == STEPS
        jax.tree.map(np.testing.assert_array_equal, jlora.nnx.adapter(other), adapter)
