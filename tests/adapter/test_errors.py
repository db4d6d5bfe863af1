"""Bad input: every error names the path and the remedy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model

KEY = jax.random.key(0)


def test_a_pattern_that_matches_nothing_names_near_misses():
    with pytest.raises(ValueError, match=r"'mix/kernal' matches no parameter; near misses: mix/kernel"):
        jlora.init(KEY, toy_model.sites(), {"mix/kernal": jlora.LoRA()})


def test_patterns_match_whole_paths():
    with pytest.raises(ValueError, match="matches no parameter"):
        jlora.init(KEY, toy_model.sites(), {"kernel": jlora.LoRA()})


def test_a_pattern_that_never_decides():
    with pytest.raises(
        ValueError, match=r"'mix/kernel' is shadowed by an earlier pattern.*'mix/.\*'.*narrower pattern first"
    ):
        jlora.init(KEY, toy_model.sites(), {"mix/.*": None, "mix/kernel": jlora.LoRA()})


@pytest.mark.parametrize(("path", "reason"), [("mix/bias", "only"), ("layers/bias", "only")])
def test_a_weight_that_is_merely_added(path, reason):
    with pytest.raises(ValueError, match=rf"cannot adapt {path} .*{reason}.*jlora.Full"):
        jlora.init(KEY, toy_model.sites(), {path: jlora.LoRA(rank=1)})
    assert set(jlora.init(KEY, toy_model.sites(), {path: jlora.Full()})) == {path}


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
    with pytest.raises(ValueError, match="rank is a positive integer"):
        jlora.LoRA(rank=rank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.LoRA(dropout=1.0), r"dropout is a fraction in \[0, 1\), not 1.0"),
        (lambda: jlora.LoRA(alpha=0.0), "LoRA's alpha is a finite non-zero number, not 0.0"),
        (lambda: jlora.LoKr(alpha=math.inf), "LoKr's alpha is a finite non-zero number, not inf"),
        (lambda: jlora.DeLoRA(reach=0.0), "reach is a finite non-zero number, not 0.0"),
        (lambda: jlora.FourierFT(scaling=math.nan), "scaling is a finite non-zero number, not nan"),
        (lambda: jlora.VeRA(seed=True), "seed is an integer, not True"),
        (lambda: jlora.LoRA(start="svd"), r"start is one of gaussian, .*olora.*'svd'"),
        (lambda: jlora.LoRA(start="pissa", a_init=jax.nn.initializers.ones), "a start or initialisers, not both"),
        (lambda: jlora.GroupedLoRA(groups=3, enable=(True, False)), "each of the 3 groups"),
        (lambda: jlora.GroupedLoRA(groups=2, enable=(False, False)), "at least one"),
        (lambda: jlora.BDLoRA(8, 3), "3 blocks do not divide its rank 8; rank 6, 9 would do"),
        (lambda: jlora.GraLoRA(8, 3), "k = 3 does not divide its rank 8; rank 6, 9 would do"),
        (lambda: jlora.Hadamard(8, 3), "k = 3 does not divide its rank 8; rank 6, 9 would do"),
        (lambda: jlora.Hadamard(8, 2, "relu"), "of is one of 'lora', 'additive', 'tanh', 'sigmoid', not 'relu'"),
        (lambda: jlora.HRA(5), "4 or 6 would do, not 5"),
        (lambda: jlora.IA3("both"), "axis is one of 'out', 'in', not 'both'"),
        (lambda: jlora.OFT(1), "block is at least 2"),
        (lambda: jlora.BOFT(3, 2), "2 or 4 would do, not 3"),
        (lambda: jlora.LoKr(factor=0), "factor is a positive integer, or -1 for the square root, not 0"),
        (lambda: jlora.FourierFT(n=0), "n is a positive integer, not 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hyper_parameters_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jlora.LoRA(rank=8.0), "rank is a positive integer, not 8.0"),  # pyright: ignore[reportArgumentType]
        (lambda: jlora.LoRA(alpha="16"), "alpha is a finite non-zero number, not '16'"),  # pyright: ignore[reportArgumentType]
        (lambda: jlora.LoRA(alpha=True), "alpha is a finite non-zero number, not True"),
        (lambda: jlora.VeRA(d_initial=None), "d_initial is a finite number, not None"),  # pyright: ignore[reportArgumentType]
        (lambda: jlora.LoRA(freeze_a="no"), "freeze_a is True or False, not 'no'"),  # pyright: ignore[reportArgumentType]
        (lambda: jlora.LoRA(rank=None), "rank is a positive integer, not None"),  # pyright: ignore[reportArgumentType]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hyper_parameters_of_another_type(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_hyper_parameters_from_numpy_become_plain_numbers():
    fields: dict[str, Any] = {"rank": np.int64(4), "alpha": np.float32(8), "freeze_a": np.bool_(True)}
    method = jlora.LoRA(**fields)
    assert [type(value) for value in (method.rank, method.alpha, method.freeze_a)] == [int, float, bool]
    assert method == jlora.LoRA(rank=4, alpha=8.0, freeze_a=True)
    assert jlora.LoKr(rank=None).rank is None


@dataclasses.dataclass(frozen=True)
class Undeclared(jlora.Method):
    """Fields with the standard names, whose annotations are strings, and one that means something else here."""

    rank: "int" = 8
    alpha: "float | None" = None
    dropout: "float" = 0.0
    scaling: "str" = "by the norm"


@pytest.mark.parametrize("values", [{"rank": -3}, {"alpha": 0.0}, {"dropout": 7.0}], ids=str)
def test_standard_fields_of_a_method_are_checked_whatever_their_annotations_look_like(values):
    with pytest.raises(ValueError, match=f"Undeclared's {next(iter(values))} is"):
        Undeclared(**values)
    assert Undeclared(alpha=None).scaling == "by the norm"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (jlora.Additive(3), r"mix/kernel .*rank 3 does not divide its in size 8; 1, 2, 4, 8 would do"),
        (jlora.MiSS(5), r"mix/kernel .*rank 5 does not divide its in size 8; 1, 2, 4, 8 would do"),
        (jlora.OFT(3), r"mix/kernel .*3 does not divide its in size 8; blocks that do: 2, 4, 8"),
        (jlora.BOFT(4, 3), r"mix/kernel .*4 \* 4 does not divide its in size 8; blocks that do: 2"),
        (jlora.GroupedLoRA(2, groups=3), "mix/kernel .*3 groups .* axis 1, 'out' of size 8; 1, 2, 4, 8 would do"),
        (jlora.C3A(3), r"mix/kernel .*block 3 does not divide both .* out size 8; 1, 2, 4, 8 would do"),
        (jlora.BDLoRA(6, 3), r"mix/kernel .*3 blocks do not divide its out axes \(8,\) .*; 1, 2 would do"),
        (jlora.BDLoRA(12, 3, "in"), r"mix/kernel .*3 blocks do not divide its in axes \(8,\) .*; 1, 2, 4 would do"),
        (jlora.QALoRA(2, 3), r"mix/kernel .*group 3 does not divide its in axes \(8,\) .*; 1, 2, 4, 8 would do"),
        (jlora.GraLoRA(6, 3), r"mix/kernel .*k = 3 does not divide its in axes \(8,\) .*; 1, 2 would do"),
        (jlora.RoAd(group=6), r"mix/kernel .*group 6 does not divide its out size 8; 2, 4, 8 would do"),
        (jlora.GroupedLoRA(5, groups=2), "mix/kernel .*rank 5 .*out size 4 of each of 2 groups; lower the rank"),
        (jlora.SHiRA(5), "mix/kernel .*80 entries are more than its 8 x 8"),
        (jlora.Hadamard(2, 1, "tanh", dropout=0.5), "mix/kernel .*dropout needs a branch"),
        (jlora.LoRA(2, start="pissa"), r"starts from the weight mix/kernel: pass jlora.init\(..., params=params\)"),
        (jlora.DoRA(2, offset=True), r"mix/kernel: DoRA multiplies the weight, .*Set offset=False"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, jlora.Method) else "",
)
def test_hyper_parameters_that_do_not_fit(method, message):
    with pytest.raises(ValueError, match=message):
        jlora.init(KEY, toy_model.sites(), {"mix/kernel": method})


def test_a_rank_above_the_axes():
    with pytest.raises(ValueError, match=r"cannot adapt mix/kernel \(8, 8\): rank 9 .* in size 8 .* out size 8"):
        jlora.init(KEY, toy_model.sites(), {"mix/kernel": jlora.LoRA(rank=9)})
    jlora.init(KEY, toy_model.sites(), {"mix/kernel": jlora.LoRA(rank=8)})


@pytest.mark.parametrize("dropout", [1.0, -0.1])
def test_a_dropout_that_is_no_share(dropout):
    with pytest.raises(ValueError, match="dropout"):
        jlora.LoRA(dropout=dropout)


def test_no_target_at_all():
    sites = jlora.trace(lambda p, x: x + p["b"], {"b": jnp.ones(3)}, jnp.ones(3))
    with pytest.raises(ValueError, match="No matmul or convolution"):
        jlora.init(KEY, sites, jlora.LoRA())


@pytest.mark.parametrize("call", ["adapt", "merge", "unmerge", "explain"])
def test_an_adapter_that_does_not_fit_names_every_misfit(call):
    params, adapter = toy_model.params(), toy_model.adapter()
    other = {**params, "mix": {"kernel": jnp.ones((8, 9)), "bias": jnp.ones(9)}, "embed": jnp.ones((11, 8), jnp.int32)}
    del other["layers"]
    calls = {
        "adapt": lambda: jlora.adapt(lambda p, x: x)(other, adapter, toy_model.tokens()),
        "explain": lambda: jlora.explain(lambda p, x: x, other, adapter, toy_model.tokens()),
        "merge": lambda: jlora.merge(other, adapter),
        "unmerge": lambda: jlora.unmerge(other, adapter),
    }
    with pytest.raises(ValueError, match="does not fit") as caught:
        calls[call]()
    text = str(caught.value)
    assert "mix/kernel: the adapter was initialised for shape (8, 8), the parameter has (8, 9)" in text
    assert "layers/up: no such parameter" in text
    assert "embed: the parameter's dtype int32" in text


def test_something_that_is_no_adapter():
    with pytest.raises(TypeError, match=r"jlora\.init"):
        jlora.merge(toy_model.params(), {"mix/kernel": jnp.ones(3)})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("given", [None, "adapter", {"w": 1.0}, [{"w": 1.0}], 3], ids=str)
def test_something_else_in_the_place_of_the_adapter(given):
    with pytest.raises(TypeError, match=r"Expected an adapter as jlora.init returns it|maps paths to the updates"):
        jlora.adapt(toy_model.model)(toy_model.params(), given, toy_model.tokens())


@pytest.mark.parametrize(
    "call",
    [
        lambda both, folder: jlora.scale(both, 0.5),
        lambda both, folder: jlora.with_dropout(both, KEY),
        lambda both, folder: jlora.truncate(both, 1),
        lambda both, folder: jlora.to_lora(both),
        lambda both, folder: jlora.restart(KEY, toy_model.sites(), toy_model.params(), both),
        lambda both, folder: jlora.save(folder / "adapter", both),
        lambda both, folder: jlora.peft.save(folder / "adapter", both, {}),
    ],
)
def test_a_list_where_one_adapter_is_meant(call, tmp_path):
    with pytest.raises(TypeError, match="Expected one adapter, found a list"):
        call([toy_model.adapter(), toy_model.adapter()], tmp_path)


def test_factors_that_lie_the_other_way():
    """As torch has them: (rank, in) and (out, rank)."""
    adapter = toy_model.adapter()
    update = adapter["mix/kernel"]
    turned = {name: factor.T for name, factor in update.factors.items()}
    adapter["mix/kernel"] = dataclasses.replace(update, factors=turned)
    with pytest.raises(ValueError, match="A factor of mix/kernel has shape"):
        jlora.adapt(toy_model.model)(toy_model.params(), adapter, toy_model.tokens())


@pytest.mark.parametrize("targets", [None, jlora.LoRA, {"mix/kernel": jlora.LoRA}, ["mix/kernel"], "mix/kernel"])
def test_targets_that_are_none(targets):
    with pytest.raises(TypeError, match=r"Targets are a method such as jlora\.LoRA\(rank=8\)"):
        jlora.init(KEY, toy_model.sites(), targets)


def test_a_pattern_that_is_no_regular_expression():
    with pytest.raises(
        ValueError, match=r"'\*/kernel' is not a regular expression .* '\.\*' stands for any characters"
    ):
        jlora.init(KEY, toy_model.sites(), {"*/kernel": jlora.LoRA()})


def test_parameters_in_the_place_of_sites():
    with pytest.raises(TypeError, match=r"come from jlora\.trace, not dict"):
        jlora.init(KEY, toy_model.params(), jlora.LoRA())  # pyright: ignore[reportArgumentType]


def test_two_parameters_of_one_path():
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match="Several parameters have the path 'a/b'"):
        jlora.trace(lambda p, x: x, params, jnp.ones(2))


def test_an_unknown_action():
    with pytest.raises(ValueError, match="on_dense"):
        jlora.adapt(toy_model.model, on_dense="ignore")  # pyright: ignore[reportArgumentType]


def test_a_kronecker_factor_of_a_convolution_without_the_window():
    w, x = jnp.ones((3, 4, 6)), jnp.ones((1, 5, 4))

    def conv(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    adapter = jlora.init(KEY, jlora.trace(conv, {"w": w}, x), jlora.LoKr(None, factor=2))
    assert adapter["w"]["d"].shape == (3, 2, 3)
    joined = dataclasses.replace(adapter["w"], factors=adapter["w"].factors | {"d": jnp.zeros((6, 3))})
    message = r"shape \(6, 3\), which does not match its axes '.stack .window in_minor out_minor'"
    with pytest.raises(ValueError, match=r"w cannot be merged.*" + message):
        jlora.merge({"w": w}, {"w": joined})
    with pytest.raises(ValueError, match=r"A factor of w has " + message):
        jlora.adapt(conv)({"w": w}, {"w": joined}, x)
