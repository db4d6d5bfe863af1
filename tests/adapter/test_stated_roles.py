"""Roles that the user states: experts that one dense einsum computes get updates of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.peft import Module

EXPERTS, WIDTH, HIDDEN = 3, 4, 5
ROLES = {"up": ("stack", "in", "out")}


def combined(p, x, c):
    """The program contracts the axis of experts."""
    return jnp.einsum("td,edh,te->th", x, p["up"], c)


def separate(p, x, c):
    """The program keeps it."""
    return jnp.einsum("td,edh->teh", x, p["up"])


def inputs(width=WIDTH, hidden=HIDDEN):
    rng = np.random.default_rng(0)
    x, c = (jnp.asarray(rng.normal(size=(6, n)), jnp.float32) for n in (width, EXPERTS))
    return {"up": jnp.asarray(rng.normal(size=(EXPERTS, width, hidden)), jnp.float32)}, x, c


@pytest.mark.parametrize("fun", [combined, separate], ids=lambda fun: fun.__name__)
@pytest.mark.parametrize(("width", "hidden"), [(4, 5), (4, 4), (3, 3)])
def test_each_expert_has_an_update_of_its_own(fun, width, hidden, tmp_path):
    params, x, c = inputs(width, hidden)
    sites = jlora.trace(fun, params, x, c, roles=ROLES)
    assert sites["up"].roles == ("stack", "in", "out")
    assert sites["up"].max_rank == min(width, hidden)
    assert f"stack {EXPERTS}, in {width}, out {hidden}" in str(sites)
    adapter = jlora.init(jax.random.key(0), sites, {"up": jlora.LoRA(2, alpha=4)})
    adapter = jax.tree.map(lambda a: a + 0.2, adapter)
    a, b = adapter["up"]["a"], adapter["up"]["b"]
    assert (a.shape, b.shape) == ((EXPERTS, width, 2), (EXPERTS, 2, hidden))
    merged = {"up": np.stack([w + 2 * a[k] @ b[k] for k, w in enumerate(params["up"])])}
    expected = fun(merged, x, c)

    def agree(value):
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)

    agree(jlora.adapt(fun, on_dense="error")(params, adapter, x, c))
    agree(fun(jlora.merge(params, adapter), x, c))
    jlora.save(tmp_path / "own", adapter, params=params)
    agree(jlora.adapt(fun)(params, jlora.load(tmp_path / "own", params=params), x, c))
    names = {"up": Module("m.experts.up", "parameter")}
    jlora.peft.save(tmp_path / "peft", adapter, names)
    agree(jlora.adapt(fun)(params, jlora.peft.load(tmp_path / "peft", sites, names), x, c))


@pytest.mark.parametrize(
    "method", [jlora.LoRA(1), jlora.DoRA(1), jlora.LoHa(1), jlora.VeRA(2)], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("fun", [combined, separate], ids=lambda fun: fun.__name__)
def test_the_law_with_stated_roles(fun, method):
    params, x, c = inputs()
    adapter = jlora.init(jax.random.key(0), jlora.trace(fun, params, x, c, roles=ROLES), {"up": method})
    adapter = jax.tree.map(lambda a: a + 0.2, adapter)
    value, expected = jlora.adapt(fun, on_dense="allow")(params, adapter, x, c), fun(jlora.merge(params, adapter), x, c)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fun", [combined, separate], ids=lambda fun: fun.__name__)
def test_a_file_of_experts_states_their_axis_itself(fun, tmp_path):
    """PEFT numbers the experts of a parameter along its first axis."""
    params, x, c = inputs()
    adapter = jlora.init(jax.random.key(0), jlora.trace(fun, params, x, c, roles=ROLES), {"up": jlora.LoRA(2)})
    adapter = jax.tree.map(lambda a: a + 0.2, adapter)
    names = {"up": Module("m.experts.up", "parameter")}
    jlora.peft.save(tmp_path / "peft", adapter, names)
    loaded = jlora.peft.load(tmp_path / "peft", jlora.trace(fun, params, x, c), names)
    assert loaded["up"].roles == ("stack", "in", "out")
    np.testing.assert_allclose(
        fun(jlora.merge(params, loaded), x, c), fun(jlora.merge(params, adapter), x, c), rtol=1e-5
    )
    joint = jlora.init(jax.random.key(0), jlora.trace(fun, params, x, c), {"up": jlora.LoRA(2)})
    with pytest.raises(ValueError, match=r"no axis of experts.*(.|\n)*roles="):
        jlora.peft.save(tmp_path / "joint", joint, names)


@pytest.mark.parametrize(
    "roles",
    [("stack", "out", "in"), ("in", "in"), ("stack", "stack", "out"), ("stack", "in", "stack"), ("out", "in", "out")],
)
def test_roles_that_contradict_the_program_are_refused(roles):
    with pytest.raises(ValueError, match=r"up \(3, 4, 5\) cannot have the stated roles .*\('in', 'in', 'out'\)"):
        jlora.trace(combined, *inputs(), roles={"up": roles})


def test_patterns_of_roles():
    params, x, c = inputs()
    with pytest.raises(ValueError, match="'down' matches no parameter; near misses: up"):
        jlora.trace(combined, params, x, c, roles={"down": ("stack", "in", "out")})
    with pytest.raises(ValueError, match="uses it in no product"):
        jlora.trace(lambda p, x: x + p["b"], {"b": jnp.ones((1, 4))}, x, roles={"b": ("in", "out")})
    with pytest.raises(ValueError, match=r"as \('in', 'out'\)"):
        jlora.trace(lambda p, x: x @ p["b"], {"b": jnp.ones((4, 4))}, x, roles={"b": ("out", "in")})


def test_a_program_with_a_parameter_named_roles():
    def fun(p, x, roles):
        return len(roles) * (x @ p["w"])

    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    assert jlora.trace(fun, params, x, roles={"w": ("out", "in")})["w"].roles == ("in", "out")
    with pytest.raises(ValueError, match="cannot have"):
        jlora.trace(fun, params, x, {"w": ()}).with_roles({"w": ("out", "in")})
