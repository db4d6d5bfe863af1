"""Bad input: every error names the path and the remedy."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from tests import small

KEY = jax.random.key(0)


def test_a_pattern_that_matches_nothing_names_near_misses():
    with pytest.raises(ValueError, match=r"'mix/kernal' matches no parameter; near misses: mix/kernel"):
        jlora.init(KEY, small.sites(), {"mix/kernal": jlora.LoRA()})


def test_patterns_match_whole_paths():
    with pytest.raises(ValueError, match="matches no parameter"):
        jlora.init(KEY, small.sites(), {"kernel": jlora.LoRA()})


def test_a_pattern_that_never_decides():
    with pytest.raises(ValueError, match=r"'mix/kernel' never decides.*'mix/.\*'.*narrower pattern first"):
        jlora.init(KEY, small.sites(), {"mix/.*": None, "mix/kernel": jlora.LoRA()})


@pytest.mark.parametrize(("path", "reason"), [("mix/bias", "only"), ("layers/bias", "only")])
def test_a_weight_that_is_merely_added(path, reason):
    with pytest.raises(ValueError, match=rf"cannot adapt {path} .*{reason}.*jlora.Full"):
        jlora.init(KEY, small.sites(), {path: jlora.LoRA(rank=1)})
    assert set(jlora.init(KEY, small.sites(), {path: jlora.Full()})) == {path}


def test_an_unused_weight():
    sites = jlora.trace(lambda p, x: x @ p["a"], {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, jnp.ones((1, 2)))
    for method in (jlora.LoRA(rank=1), jlora.Full()):
        with pytest.raises(ValueError, match=r"cannot adapt b .*does not use it"):
            jlora.init(KEY, sites, {"b": method})


def test_a_weight_that_is_not_floating_point():
    sites = jlora.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2), jnp.int8)}, jnp.ones((1, 2), jnp.int8))
    for method in (jlora.LoRA(rank=1), jlora.Full()):
        with pytest.raises(ValueError, match=r"cannot adapt w .*int8(?!.*jlora.Full).*exclude the path"):
            jlora.init(KEY, sites, {"w": method})


@pytest.mark.parametrize("rank", [0, -1, True])
def test_a_rank_that_is_none(rank):
    with pytest.raises(ValueError, match="rank is a whole number from 1 on"):
        jlora.LoRA(rank=rank)


def test_a_rank_above_the_axes():
    with pytest.raises(ValueError, match=r"cannot adapt mix/kernel \(8, 8\): rank 9 .* in size 8 .* out size 8"):
        jlora.init(KEY, small.sites(), {"mix/kernel": jlora.LoRA(rank=9)})
    jlora.init(KEY, small.sites(), {"mix/kernel": jlora.LoRA(rank=8)})


@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_a_dropout_that_is_no_share(dropout):
    with pytest.raises(ValueError, match="dropout"):
        jlora.LoRA(dropout=dropout)


def test_no_target_at_all():
    sites = jlora.trace(lambda p, x: x + p["b"], {"b": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(ValueError, match="No product"):
        jlora.init(KEY, sites, jlora.LoRA())


@pytest.mark.parametrize("call", ["adapt", "merge", "unmerge", "explain"])
def test_an_adapter_that_does_not_fit_names_every_misfit(call):
    params, adapter = small.params(), small.adapter()
    other = {**params, "mix": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)}, "embed": jnp.ones((11, 8), jnp.int32)}
    del other["layers"]
    calls = {
        "adapt": lambda: jlora.adapt(lambda p, x: x)(other, adapter, small.tokens()),
        "explain": lambda: jlora.explain(lambda p, x: x, other, adapter, small.tokens()),
        "merge": lambda: jlora.merge(other, adapter),
        "unmerge": lambda: jlora.unmerge(other, adapter),
    }
    with pytest.raises(ValueError, match="does not fit") as caught:
        calls[call]()
    text = str(caught.value)
    assert "mix/kernel: the adapter was made for shape (8, 8), the parameter has (8, 9)" in text
    assert "layers/up: no such parameter" in text
    assert "embed: the parameter's dtype int32" in text


def test_something_that_is_no_adapter():
    with pytest.raises(TypeError, match=r"jlora\.init"):
        jlora.merge(small.params(), {"mix/kernel": jnp.ones(3)})


def test_two_parameters_of_one_path():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="Several parameters have the path 'a/b'"):
        jlora.trace(lambda p, x: x, params, jnp.ones(2))


def test_an_unknown_action():
    with pytest.raises(ValueError, match="on_dense"):
        jlora.adapt(small.model, on_dense="ignore")
