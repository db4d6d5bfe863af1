"""What else people do with a module works with an adapted one as with the plain one."""

import copy
import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora
from tests.support.nnx_models import LORA, WIDTH, case, integers, same_state, with_integers

X = integers(jnp.ones((4, WIDTH)), 3)


def adapted(module, *args, targets=None, **kwargs):
    """The module with factors that are not zero, and the plain module with merged weights."""
    model: Any = jlora.nnx.adapt(module, targets or {".*kernel": LORA}, *(args or (X,)), rngs=nnx.Rngs(1), **kwargs)
    jlora.nnx.set_adapter(model, integers(jlora.nnx.adapter(model)))
    return model, jlora.nnx.merge(model)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


class Many(nnx.Module):
    """Methods of every kind, state of every kind, and a weight in a list."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.weights = nnx.List([nnx.Param(jnp.eye(WIDTH))])
        self.dropout = nnx.Dropout(0.5)
        self.calls = 0

    @nnx.remat
    def remat(self, x):
        return jnp.tanh(self.linear(x))

    @jax.jit
    def jitted(self, x):
        return self.linear(x)

    @nnx.jit
    def nnx_jitted(self, x):
        return x @ self.weights[0]

    @property
    def width(self):
        return self.linear.out_features

    @staticmethod
    def doubled(x):
        return 2 * x

    def parts(self):
        return self.linear, self.linear.kernel

    def keep(self, x):
        """Creates a Variable and changes an attribute."""
        y = self.linear(x)
        self.last = nnx.Intermediate(y)
        self.calls += 1
        return y

    def sown(self, x):
        y = self.linear(x)
        self.sow(nnx.Intermediate, "y", y)
        return y

    def __call__(self, x, *, rngs=None, scale=1.0, name="a", mask=None):
        assert isinstance(scale, float)
        assert name in ("a", "b")
        y = self.dropout(self.linear(x), rngs=rngs, deterministic=rngs is None)
        return {name: y * scale, "mask": mask, "weights": x @ self.weights[0]}


def every_method(model, x):
    return model(x), model.remat(x), model.jitted(x), model.nnx_jitted(x)


@functools.cache
def many():
    return adapted(with_integers(Many(nnx.Rngs(0))), targets={".*(kernel|0)": LORA}, method=every_method)


@pytest.mark.nightly
def test_every_method_is_adapted():
    model, plain = many()
    assert list(jlora.nnx.adapter(model)) == ["linear/kernel", "weights/0"]
    jax.tree.map(close, every_method(model, X), every_method(plain, X))
    assert model.width == WIDTH
    assert model.doubled(2) == 4
    linear, kernel = model.parts()
    assert linear is model.linear
    assert kernel is model.linear.kernel


@pytest.mark.nightly
def test_a_part_is_adapted_on_its_own():
    model, plain = many()
    close(model.linear(X), plain.linear(X))
    assert isinstance(model.linear, nnx.Linear)
    stack, merged = (each.layers for each in adapted(case("scanned").module))
    scan: Any = nnx.scan(lambda x, layer: layer.linear(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    close(scan(X, stack), scan(X, merged))


@pytest.mark.nightly
def test_arguments_that_are_not_arrays_and_results_that_are_nested():
    model, plain = many()
    streams = nnx.Rngs(5), nnx.Rngs(5)
    for _ in range(2):
        actual, expected = (
            each(X, rngs=rngs, scale=2.0, name="b", mask=None)
            for each, rngs in zip((model, plain), streams, strict=True)
        )
        assert actual.keys() == expected.keys()
        assert actual["mask"] is None
        close(actual["b"], expected["b"])
    same_state(*streams)


@pytest.mark.nightly
def test_attributes_and_variables_that_a_call_creates_are_kept():
    model, plain = adapted(with_integers(Many(nnx.Rngs(0))))
    capture = nnx.capture(lambda module, x: module.sown(x), nnx.Intermediate)
    for _ in range(2):
        close(model.keep(X), plain.keep(X))
        jax.tree.map(close, capture(model, X), capture(plain, X))
    same_state(jlora.nnx.base(model), plain)
    assert model.calls == 2
    close(nnx.jit(lambda module, x: module.keep(x))(model, X), plain.keep(X))
    assert model.calls == 3


@pytest.mark.nightly
def test_a_call_that_changes_nothing_may_be_inside_of_any_transformation():
    model, plain = adapted(case("batch_norm").module)
    for each in (model, plain):
        each.eval()
    close(jax.vmap(model)(X), plain(X))
    close(jax.grad(lambda x: model(x).sum())(X), jax.grad(lambda x: plain(x).sum())(X))
    close(jax.jit(lambda module, x: module(x))(model, X), plain(X))
    close(nnx.jit(lambda module, x: module(x), graph=False)(model, X), plain(X))
    model.train()
    view = nnx.view(model, deterministic=True, use_running_average=True)
    close(view(X), plain(X))
    assert not model.dropout.deterministic


@pytest.mark.nightly
def test_copies_and_files_of_python():
    model, _ = adapted(case("batch_norm").module)
    for other in (
        nnx.clone(model),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        nnx.merge(*nnx.split(model)),
    ):
        assert type(other) is type(model)
        other.eval()
        close(other(X), jlora.nnx.merge(other)(X))
        jax.tree.map(np.testing.assert_array_equal, jlora.nnx.adapter(other), jlora.nnx.adapter(model))
    assert "kernel_lora=Factors(" in repr(model)


@pytest.mark.nightly
def test_an_adapted_module_in_a_larger_one_and_beside_others():
    class Larger(nnx.Module):
        def __init__(self, inner: Any):
            self.inner, self.out = inner, nnx.Linear(3, 2, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.out(self.inner(x))

    model, plain = adapted(case("batch_norm").module)
    close(Larger(model)(X), Larger(plain)(X))
    same_state(jlora.nnx.base(model), plain)
    assert list(jlora.nnx.adapter(Larger(model))) == ["inner/down/kernel", "inner/up/kernel"]

    def make(rngs):
        return jlora.nnx.adapt(nnx.Linear(WIDTH, 3, rngs=rngs), {"kernel": LORA}, X, rngs=rngs)

    models: Any = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).split(3))
    assert models.kernel_lora.update.factors["a"].shape == (3, WIDTH, 2)

    def call(module: Any, x):
        return module(x)

    function: Any = call
    run: Any = nnx.vmap(function, in_axes=(0, None))
    close(run(models, X), jnp.einsum("bi,mio->mbo", X, models.kernel[...]))


@pytest.mark.nightly
def test_abstract_modules_are_traced():
    each = case("scanned")
    make: Any = type(each.module)
    model, abstract = each.adapted(), nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    expected = {path: (site.shape, site.roles) for path, site in jlora.nnx.trace(each.module, X).items()}
    assert expected["layers/linear/kernel"] == ((2, WIDTH, WIDTH), ("stack", "in", "out"))
    for module in (abstract, model):
        sites = jlora.nnx.trace(module, X)
        assert {path: (site.shape, site.roles) for path, site in sites.items()} == expected
    uses = jlora.nnx.explain(model, X).uses
    assert [(use.path, use.factored) for use in uses] == [("layers/linear/kernel", True), ("head/kernel", True)]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"nope": LORA}, "matches no parameter; near misses"),
        ({".*mean": LORA}, "matches no parameter"),
        ({"up/bias": LORA}, "LoRA cannot adapt up/bias"),
        ({".*": LORA, "up/kernel": None}, "is shadowed"),
    ],
)
def test_targets_that_jlora_init_refuses(targets, message):
    with pytest.raises(ValueError, match=message):
        jlora.nnx.adapt(case("batch_norm").module, targets, X, rngs=nnx.Rngs(0))


class Changing(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.linear(x)
        self.linear.kernel[...] *= 0.5
        return y


def test_misuse_is_refused():
    model, _ = adapted(case("batch_norm").module)
    updates = jlora.nnx.adapter(model)
    with pytest.raises(ValueError, match=r"adapted already.*jlora\.nnx\.base"):
        jlora.nnx.adapt(model, updates)
    with pytest.raises(ValueError, match=r"Normalised is not adapted"):
        jlora.nnx.merge(jlora.nnx.base(model))
    with pytest.raises(TypeError, match=r"pass rngs=nnx\.Rngs\(0\)"):
        jlora.nnx.adapt(jlora.nnx.base(model), {".*kernel": LORA}, X)
    with pytest.raises(ValueError, match=r"another form than the module's, at up/kernel"):
        jlora.nnx.set_adapter(model, {"down/kernel": updates["down/kernel"]})
    with pytest.raises(ValueError, match=r"up/kernel: no such parameter.*\n.*linear/kernel: the adapter was in"):
        jlora.nnx.adapt(Changing(), {"up/kernel": updates["up/kernel"], "linear/kernel": updates["up/kernel"]})
    changing = jlora.nnx.adapt(Changing(), {".*kernel": LORA}, X, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"The call changes linear/kernel, which has an update"):
        changing(X)
    taken: Any = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))
    taken.kernel_lora = 3
    with pytest.raises(ValueError, match=r"attribute 'kernel_lora' already: rename it"):
        jlora.nnx.adapt(taken, {"kernel": LORA}, X, rngs=nnx.Rngs(0))


@pytest.mark.nightly
def test_a_dense_use_is_reported_as_asked():
    class Cubed(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.eye(WIDTH))

        def __call__(self, x):
            return x @ self.kernel[...] + jnp.sum(self.kernel[...] ** 3)

    for on_dense in ("allow", "error"):
        model, plain = adapted(Cubed(), targets={"kernel": LORA}, on_dense=on_dense)
        if on_dense == "allow":
            close(model(X), plain(X))
            continue
        with pytest.raises(jlora.DenseError, match="kernel: "):
            model(X)


@pytest.mark.nightly
@pytest.mark.parametrize("method", [jlora.DoRA(2), jlora.IA3(), jlora.Full(), jlora.LoRA(2, offset=True)], ids=repr)
def test_methods(method):
    model, plain = adapted(nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0)), targets={"kernel": method})
    close(model(X), plain(X))


@pytest.mark.nightly
def test_a_quantised_weight():
    weight = jnp.ones((64, 64))
    sites = jlora.trace(lambda p, x: x @ p["kernel"], {"kernel": weight}, jnp.ones((2, 64)))
    linear = nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel.set_raw_value(jlora.quantize({"kernel": weight}, sites, {"kernel": "nf4"})["kernel"])
    x = jnp.ones((2, 64))
    model, plain = adapted(linear, x, targets={"kernel": LORA})
    update = jlora.nnx.adapter(model)["kernel"]
    expected = x @ (jlora.dequantize(linear.kernel.get_raw_value()) + update["a"] @ update["b"])
    close(model(x), expected)
    close(plain(x), expected)
