"""Banks: stacking members that differ, names, replacement, shardings, files of single members."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jlora
from tests.support import toy_model

MODEL = toy_model.model


def lora(rank: int, seed: int, **options: Any) -> Any:
    return toy_model.adapter(jlora.LoRA(rank, **options), seed)


def some(method: jlora.Method, seed: int, path: str = "layers/up") -> Any:
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), toy_model.sites(), {path: method}))
    return toy_model.nonzero(shapes, seed)


def mixed() -> dict[str, Any]:
    """Members that differ in rank, scale, targets, trained factors and offset."""
    return {
        "plain": lora(2, 1, alpha=3.0),
        "stabilised": lora(4, 2, alpha=8.0, rank_stabilized=True),
        "some": some(jlora.LoRA(3, alpha=5.0), 3),
        "frozen": lora(1, 4, freeze_a=True),
        "offset": some(jlora.LoRA(2, start="gaussian", offset=True), 5),
        "scaled": jlora.scale(lora(2, 6), 0.25),
        "sum": some(jlora.LoHa(2, alpha=2.0), 7),
    }


@pytest.mark.drawn(3)
@pytest.mark.parametrize("name", mixed())
def test_a_member_equals_its_adapter(name: str) -> None:
    members, params = mixed(), toy_model.params()
    bank = jlora.bank.stack(members)
    want = jlora.adapt(MODEL)(params, members[name], toy_model.tokens())
    np.testing.assert_allclose(jlora.adapt(MODEL)(params, bank[name], toy_model.tokens()), want, rtol=2e-5, atol=2e-5)
    assert bank[name].keys() == members[name].keys()


def test_members_keep_their_rank_and_scale() -> None:
    adapters = {"small": lora(1, 1, alpha=2.0), "large": lora(4, 2, alpha=8.0, rank_stabilized=True)}
    bank = jlora.bank.stack(adapters)
    assert {update.method for update in bank["small"].values()} == {jlora.LoRA(1, alpha=2.0)}
    assert {update.method for update in bank["large"].values()} == {jlora.LoRA(4, alpha=16.0)}  # 8 / sqrt(4) = 16 / 4
    for name, adapter in adapters.items():
        values = jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(bank[name]), jax.tree.leaves(adapter))
        assert values
    assert jlora.bank.unstack(bank).keys() == adapters.keys()


def test_names() -> None:
    bank = jlora.bank.stack({"films": lora(1, 1), "tweets": lora(2, 2)})
    assert (len(bank), list(bank), "films" in bank, "books" in bank) == (2, ["films", "tweets"], True, False)
    assert bank.ids(["tweets", None, "films"]).tolist() == [1, -1, 0]
    with pytest.raises(KeyError, match=r"no adapter 'film'.*films"):
        bank["film"]
    assert "2 adapters: films, tweets" in repr(bank)


def test_dora_of_different_ranks_and_scales() -> None:
    members = {str(rank): toy_model.adapter(jlora.DoRA(rank, alpha=3.0), rank) for rank in (1, 3)}
    bank, params = jlora.bank.stack(members), toy_model.params()
    out = jlora.bank.vmap(MODEL, None)(params, bank, toy_model.tokens())
    for k, name in enumerate(members):
        want = MODEL(jlora.merge(params, members[name]), toy_model.tokens())
        np.testing.assert_allclose(out[k], want, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (lambda: {}, "nothing to stack"),
        (lambda: {"a": {}}, "nothing to stack"),
        (lambda: {"a": lora(1, 1, dropout=0.1), "b": lora(1, 2)}, "different dropout rates.*'a': 0.1.*Pass dropout="),
        (lambda: {"a": lora(1, 1), "b": some(jlora.OFT(4), 2)}, "b: .*OFT.*no equal LoRA"),
        (lambda: {"a": lora(1, 1), "b": toy_model.adapter(jlora.IA3(), 2)}, "b: .*IA3.*no equal LoRA"),
        (lambda: {"a": jlora.with_rank(lora(2, 1), jax.random.key(0))}, "a: .*rank mask.*inside the loss"),
    ],
)
def test_what_cannot_be_stacked(members: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){sentence}"):
        jlora.bank.stack(members())


def test_adapters_of_other_weights_are_refused() -> None:
    def other(p: Any, x: Any) -> Any:
        return x @ p["mix"]["kernel"]

    params = {"mix": {"kernel": jnp.ones((5, 6))}}
    small = jlora.init(jax.random.key(0), jlora.trace(other, params, jnp.ones((2, 5))), jlora.LoRA(1))
    with pytest.raises(ValueError, match=r"mix/kernel: the members were made for different shapes.*\(5, 6\)"):
        jlora.bank.stack({"a": lora(1, 1), "b": small})
    with pytest.raises(TypeError, match="from names to adapters"):
        jlora.bank.stack([lora(1, 1)])  # pyright: ignore[reportArgumentType]


def test_dropout_of_all() -> None:
    bank = jlora.bank.stack({"a": lora(1, 1, dropout=0.1), "b": lora(1, 2)}, dropout=0.0)
    assert {update.method.dropout for update in bank.adapter.values()} == {0.0}


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.nightly)])
def test_replacements_compile_once(count: int) -> None:
    """Members of other ranks, scales and targets in one compiled program."""
    params, tokens = toy_model.params(), toy_model.tokens()
    bank = jlora.bank.stack({"a": lora(1, 1), "b": lora(2, 2)}, rank=4)
    run: Any = jax.jit(lambda params, bank, tokens: jlora.bank.vmap(MODEL, None)(params, bank, tokens))
    out = run(params, bank, tokens)
    choices = [lora(rank, seed, alpha=alpha) for seed, (rank, alpha) in enumerate([(1, 2.0), (3, None), (4, 0.5)])]
    choices.append({"mix/kernel": choices[0]["mix/kernel"]})
    for k in range(count):
        bank = bank.replace("ab"[k % 2], choices[k % 4])
        if k % 20 == 19:
            out = run(params, bank, tokens)
    assert run._cache_size() == 1
    want = jlora.adapt(MODEL)(params, choices[3], tokens)
    np.testing.assert_allclose(out[1], want, rtol=2e-5, atol=2e-5)


def test_replacements_that_do_not_fit() -> None:
    bank = jlora.bank.stack({"a": {"mix/kernel": lora(2, 1)["mix/kernel"]}})
    with pytest.raises(ValueError, match="a: mix/kernel has rank 3, above the bank's 2"):
        bank.replace("a", {"mix/kernel": lora(3, 1)["mix/kernel"]})
    with pytest.raises(ValueError, match=r"a adapts .* weights that the bank does not"):
        bank.replace("a", lora(2, 1))
    with pytest.raises(ValueError, match=r"OFT.*no equal LoRA"):
        bank.replace("a", {"mix/kernel": some(jlora.OFT(4), 2, "mix/kernel")["mix/kernel"]})
    with pytest.raises(KeyError, match="no adapter 'c'"):
        bank.replace("c", {})
    own = jlora.bank.stack({"a": some(jlora.OFT(4), 2)})
    with pytest.raises(ValueError, match=r"LoRA.*and the bank OFT"):
        own.replace("a", some(jlora.LoRA(1), 1))


@pytest.mark.parametrize("axis", [None, "data"])
def test_shardings(axis: str | None) -> None:
    """Factors are placed like their weights, members along the given axis of the mesh."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = toy_model.params()
    params["mix"]["kernel"] = jax.device_put(params["mix"]["kernel"], NamedSharding(mesh, PartitionSpec(None, "model")))
    bank = jlora.bank.stack({"a": {"mix/kernel": lora(1, 1)["mix/kernel"]}, "b": {}})
    places = jlora.bank.shardings(bank, params, axis=axis)
    placed = jax.device_put(bank, places)
    specs = {name: array.sharding.spec for name, array in placed.adapter["mix/kernel"].factors.items()}
    assert specs == {"a": PartitionSpec(axis, None, None), "b": PartitionSpec(axis, None, "model")}
    assert placed.adapter["mix/kernel"].traced_scale.sharding.spec == PartitionSpec(axis)
    out = jax.jit(jlora.bank.vmap(MODEL, None))(params, placed, toy_model.tokens())
    np.testing.assert_allclose(out[1], MODEL(toy_model.params(), toy_model.tokens()), rtol=2e-5, atol=2e-5)


def test_shardings_that_do_not_fit() -> None:
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    params, bank = toy_model.params(), jlora.bank.stack({"a": {"mix/kernel": lora(1, 1)["mix/kernel"]}})
    with pytest.raises(ValueError, match="placed on a mesh"):
        jlora.bank.shardings(bank, params, axis="model")
    params["mix"]["kernel"] = jax.device_put(params["mix"]["kernel"], NamedSharding(mesh, PartitionSpec("model")))
    with pytest.raises(ValueError, match="is not an axis of the mesh: model"):
        jlora.bank.shardings(bank, params, axis="data")
    with pytest.raises(ValueError, match="placed along 'model' already"):
        jlora.bank.shardings(bank, params, axis="model")


def test_under_jit_a_member_has_the_ranks_of_the_bank() -> None:
    params, tokens = toy_model.params(), toy_model.tokens()
    bank = jlora.bank.stack({"a": lora(1, 1, alpha=2.0), "b": lora(3, 2)})
    run = jax.jit(lambda params, bank: jlora.adapt(MODEL)(params, bank["a"], tokens))
    want = jlora.adapt(MODEL)(params, bank["a"], tokens)
    np.testing.assert_allclose(run(params, bank), want, rtol=2e-5, atol=2e-5)


def test_quantised_bases() -> None:
    params, tokens = jlora.quantize(toy_model.params(), toy_model.sites(), {"mix/kernel": "int8"}), toy_model.tokens()
    bank = jlora.bank.stack({"a": lora(1, 1), "b": lora(2, 2)})
    out = jlora.bank.vmap(MODEL, None)(params, bank, tokens)
    for k, name in enumerate(bank):
        want = jlora.adapt(MODEL)(params, bank[name], tokens)
        np.testing.assert_allclose(out[k], want, rtol=2e-5, atol=2e-5)
