"""How sites, explanations and adapters are shown: the exact text."""

import html
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.support import toy_model

TOY_SITES = """\
path         count  shape   dtype    axes                   consumed by          FLOPs  adaptable
-----------  -----  ------  -------  ---------------------  -------------------  -----  ---------
embed            1  11x8    float32  in 11, out 8           gather, dot_general  12.1%  yes
layers/down      1  3x12x8  float32  stack 3, in 12, out 8  dot_general          39.6%  yes
layers/up        1  3x8x12  float32  stack 3, in 8, out 12  dot_general          39.6%  yes
mix/kernel       1  8x8     float32  in 8, out 8            dot_general           8.8%  yes
4 parameters, 728 numbers; 4 can be adapted with low rank; a forward pass takes 1.46e+04 FLOPs in products"""

LAYERS = """\
path                         count  shape  dtype    axes         consumed by  FLOPs  adaptable
---------------------------  -----  -----  -------  -----------  -----------  -----  -------------------------------
head                             1  4x3    float32  in 4, out 3  dot_general   3.3%  yes
layer_{0..5}/query/kernel        6  4x4    float32  in 4, out 4  dot_general  26.4%  yes
layer_{0,2..5}/value/kernel      5  4x4    float32  in 4, out 4  dot_general  22.0%  yes
layer_{0..3}/w_{0,1}             8  4x4    float32  in 4, out 4  dot_general  35.2%  yes
layer_1/value/kernel             1  4x4    float32                                   no: the program does not use it
layer_{4,5}/w_0                  2  4x2    float32  in 4, out 2  dot_general   4.4%  yes
layer_{4,5}/w_1                  2  2x4    float32  in 2, out 4  dot_general   4.4%  yes
w_00                             1  4x4    float32  in 4, out 4  dot_general   4.4%  yes
26 parameters, 380 numbers; 25 can be adapted with low rank; a forward pass takes 1.46e+03 FLOPs in products"""


def layered_params() -> dict:
    """Layers that are alike, but for the widths of the last two; an adapter of one, and a name with zeros."""

    def layer(k: int) -> dict:
        width = 4 if k < 4 else 2
        return {
            "query": {"kernel": jnp.ones((4, 4))},
            "value": {"kernel": jnp.ones((4, 4))},
            "w_0": jnp.ones((4, width)),
            "w_1": jnp.ones((width, 4)),
        }

    return {"head": jnp.ones((4, 3)), "w_00": jnp.ones((4, 4)), **{f"layer_{k}": layer(k) for k in range(6)}}


def layered_model(p: dict, x: jax.Array) -> jax.Array:
    x = x @ p["w_00"]
    for k in range(6):
        layer = p[f"layer_{k}"]
        x = x @ layer["query"]["kernel"]
        if k != 1:
            x = x @ layer["value"]["kernel"]
        x = x @ layer["w_0"] @ layer["w_1"]
    return x @ p["head"]


def layered_sites() -> jlora.Sites:
    return jlora.trace(layered_model, layered_params(), jnp.ones((2, 4)))


def test_adaptable_sites_are_shown_as_a_table():
    adaptable = toy_model.sites().adaptable
    assert isinstance(adaptable, jlora.Sites)
    assert list(adaptable) == ["embed", "layers/down", "layers/up", "mix/kernel"]
    assert str(adaptable) == repr(adaptable) == TOY_SITES


def test_a_site_that_cannot_be_adapted_shows_the_reason():
    row = next(line for line in str(toy_model.sites()).splitlines() if line.startswith("mix/bias"))
    assert row.endswith("no: no product, convolution or lookup uses it (only add)")


def test_repeated_layers_are_one_row():
    assert str(layered_sites()) == LAYERS


def test_layers_of_different_dtypes_are_two_rows():
    params = {f"w_{k}": jnp.ones((4, 4), jnp.float32 if k else jnp.bfloat16) for k in range(3)}
    sites = jlora.trace(lambda p, x: x @ p["w_0"].astype(x.dtype) @ p["w_1"] @ p["w_2"], params, jnp.ones((2, 4)))
    assert [line.split()[:2] for line in str(sites).splitlines()[2:4]] == [["w_0", "1"], ["w_{1,2}", "2"]]


EXPLANATION = """\
path                       uses  primitive    form      base FLOPs  added FLOPs  dense bytes  why                                where
-------------------------  ----  -----------  --------  ----------  -----------  -----------  ---------------------------------  -----
w_00                          1  dot_general  factored          64           64               factored 192, dense sum 272 FLOPs  layered_model
layer_{0..5}/query/kernel     6  dot_general  factored         384          384               factored 192, dense sum 272 FLOPs  layered_model
head                          1  dot_general  factored          48           56               factored 168, dense sum 204 FLOPs  layered_model
w_00                          1  reduce_sum   dense              0           16           64  no rule for this use               with_dense_use
9 uses, 1 dense; the adapter adds 520 FLOPs (35.71% of the base's 1.46e+03)"""  # noqa: E501


def test_an_explanation_is_shown_with_repeated_layers_as_one_row():
    def with_dense_use(p: dict, x: jax.Array) -> jax.Array:
        return layered_model(p, x) + p["w_00"].sum()

    adapter = jlora.init(jax.random.key(0), layered_sites(), {"head|w_00|.*/query/kernel": jlora.LoRA(rank=2)})
    text = str(jlora.explain(with_dense_use, layered_params(), adapter, jnp.ones((2, 4))))
    # Of a source line, FILE:LINE:COLUMN (FUNCTION), the function alone stays the same.
    text = re.sub(r"\S*test_display\.py\S* \(.*?(\w+)\)", r"\1", text)
    assert re.sub("-+\n", "-----\n", text, count=1) == EXPLANATION


def test_an_explanation_names_the_form_of_every_use():
    targets = {"w_00": jlora.HiRA(rank=2), "head": jlora.LoRA(rank=2)}
    adapter = jlora.init(jax.random.key(0), layered_sites(), targets)
    uses = jlora.explain(layered_model, layered_params(), adapter, jnp.ones((2, 4))).uses
    assert [(use.path, use.form) for use in uses] == [("w_00", "dense sum"), ("head", "factored")]


@pytest.mark.parametrize("shown", ["sites", "explanation", "summary"])
def test_notebooks_show_the_same_cells(shown):
    sites = toy_model.sites()
    explanation = jlora.explain(toy_model.model, toy_model.params(), toy_model.adapter(), toy_model.tokens())
    summary = jlora.summary(toy_model.adapter(), toy_model.params())
    table = {"sites": sites, "explanation": explanation, "summary": summary}[shown]
    markup = html.unescape(table._repr_html_())
    assert markup.count("<tr>") == len(str(table).splitlines()) - 2  # neither the rule nor the last line
    assert f"<p>{str(table).splitlines()[-1]}</p>" in markup
    assert ">layers/up</td>" in markup


def test_markup_is_escaped():
    sites = jlora.trace(lambda p, x: x @ p["<w>"], {"<w>": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert "&lt;w&gt;" in sites._repr_html_()
    assert "<w>" not in sites._repr_html_()


SUMMARY = """\
path                       count  method  rank  shape  numbers  bytes   norm
-------------------------  -----  ------  ----  -----  -------  -----  -----
head                           1  LoRA       2  4x3         14     56   6.93
layer_{0..2}/query/kernel      3  LoRA       2  4x4         48    192  8..72
layer_3/query/kernel           1  LoRA       1  4x4          8     32      4
layer_{4,5}/w_0                2  IA3           4x2          4     16      0
7 updates, 74 numbers (19.5% of the base's 380), 296 bytes"""


def layered_adapter() -> jlora.Adapter:
    """What a LoRA of ones adds has its rank in every entry, here times 1, 5 and 9; an IA3 of ones adds nothing."""
    low_rank = {"head|layer_[0-2]/query/kernel": jlora.LoRA(rank=2), "layer_3/query/kernel": jlora.LoRA(rank=1)}
    adapter = jlora.init(jax.random.key(0), layered_sites(), {**low_rank, "layer_[45]/w_0": jlora.IA3()})
    adapter = jax.tree.map(jnp.ones_like, adapter)
    for k in range(3):
        query = adapter[f"layer_{k}/query/kernel"]
        query.factors["b"] = (1 + 4 * k) * query.factors["b"]
    return adapter


def test_a_summary_is_shown_as_a_table():
    assert str(jlora.summary(layered_adapter(), layered_params())) == SUMMARY
    without = SUMMARY.replace("     16      0", "     16").replace(" (19.5% of the base's 380)", "")
    assert str(jlora.summary(layered_adapter())) == without


def test_the_norm_is_that_of_the_change():
    adapter, params = toy_model.adapter(), toy_model.params()
    adapter["mix/kernel"] = toy_model.adapter(jlora.DoRA(rank=2))["mix/kernel"]
    merged = jlora.merge(params, adapter)
    changes = {
        "embed": merged["embed"] - params["embed"],
        "mix/kernel": merged["mix"]["kernel"] - params["mix"]["kernel"],
    }
    norms = {update.path: update.norm for update in jlora.summary(adapter, params).updates}
    for path, change in changes.items():
        assert norms[path] == pytest.approx(np.linalg.norm(change), rel=1e-5)
    without = {update.path: update.norm for update in jlora.summary(adapter).updates}
    assert without["embed"] == pytest.approx(norms["embed"], rel=1e-5)
    assert without["mix/kernel"] is None
    abstract = jlora.summary(jax.eval_shape(lambda: adapter), params)
    assert {update.norm for update in abstract.updates} == {None}
    assert abstract.bytes == sum(a.nbytes for a in jax.tree.leaves(adapter))
    assert abstract.base_numbers == 760


def test_a_summary_checks_its_arguments():
    with pytest.raises(ValueError, match="no such parameter"):
        jlora.summary(layered_adapter(), toy_model.params())
    with pytest.raises(TypeError, match="one adapter"):
        jlora.summary([layered_adapter()])  # pyright: ignore[reportArgumentType]


def test_methods_show_what_differs_from_the_defaults():
    assert repr(jlora.LoRA(rank=8)) == "LoRA(rank=8)"
    assert repr(jlora.LoRA(rank=2, alpha=4.0, dropout=0.5)) == "LoRA(rank=2, alpha=4.0, dropout=0.5)"
    assert repr(jlora.Full()) == "Full()"


def test_updates_show_dtypes_and_shapes():
    adapter = jlora.init(jax.random.key(0), toy_model.sites(), {"mix/kernel": jlora.LoRA(rank=2)})
    assert str(adapter) == "{'mix/kernel': Update(LoRA(rank=2), a: f32[8, 2], b: f32[2, 8])}"
    half = jlora.scale(jax.tree.map(lambda a: a.astype(jnp.bfloat16), adapter), 0.5)
    assert repr(half["mix/kernel"]) == "Update(LoRA(rank=2), a: bf16[8, 2], b: bf16[2, 8], scale=0.5)"
    assert repr(jax.eval_shape(lambda: adapter)) == repr(adapter)
    assert repr(jlora.labels(adapter)["mix/kernel"]) == "Update(LoRA(rank=2), a: 'a', b: 'b')"


def test_updates_show_what_does_not_train():
    method = jlora.LoRA(rank=2, dropout=0.5, freeze_a=True)
    adapter = jlora.init(jax.random.key(0), toy_model.sites(), {"layers/up": method})
    update = jlora.with_dropout(adapter, jax.random.key(1))["layers/up"]
    method_text = "LoRA(rank=2, dropout=0.5, freeze_a=True)"
    assert repr(update) == f"Update({method_text}, b: f32[3, 2, 12], frozen a: f32[3, 8, 2], key: key<fry>[3])"
