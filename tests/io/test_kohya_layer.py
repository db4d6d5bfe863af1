"""Files of kohya and diffusers for one layer: scales, what is refused, and what cannot be saved."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

import jlora
from jlora.kohya import Module

# One linear layer and its bias.
KEY = "lora_unet_a_b"
PARAMS = {"a_b": jnp.ones((3, 4)), "bias": jnp.ones(4)}
NAMES = {"a_b": "unet.a.b", "bias": Module("unet.a.b.bias", "parameter")}


def layer(params: Any, x: jax.Array) -> jax.Array:
    return x @ params["a_b"] + params["bias"][None]


@pytest.fixture
def sites() -> jlora.Sites:
    return jlora.trace(layer, PARAMS, jnp.ones((2, 3)))


def lora(rank: int = 2, key: str = KEY) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    down, up = (rng.normal(size=shape).astype(np.float32) for shape in ((rank, 3), (4, rank)))
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": np.full((), 5, np.float32)}


@pytest.mark.parametrize(
    "key", [KEY, "unet.a.b", pytest.param("unet.a.b", id="names of PEFT"), pytest.param("unet.a.b", id="old names")]
)
def test_the_scale_is_alpha_by_rank(tmp_path, sites, key, request):
    endings = {"names of PEFT": ("lora_A", "lora_B"), "old names": ("lora.down", "lora.up")}
    down, up = endings.get(request.node.callspec.id, ("lora_down", "lora_up"))
    tensors = {k.replace("lora_down", down).replace("lora_up", up): v for k, v in lora(key=key).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = jlora.kohya.load(tmp_path / "a.safetensors", sites, NAMES)
    given = lora()
    expected = 1 + 5 / 2 * (given[f"{KEY}.lora_up.weight"] @ given[f"{KEY}.lora_down.weight"]).T
    np.testing.assert_allclose(jlora.merge(PARAMS, adapter)["a_b"], expected, rtol=1e-5, atol=1e-5)


def test_without_alpha_the_scale_is_one(tmp_path, sites):
    tensors = {key: value for key, value in lora().items() if "alpha" not in key}
    save_file(tensors, tmp_path / "a.safetensors")
    assert jlora.kohya.load(tmp_path / "a.safetensors", sites, NAMES)["a_b"].method == jlora.LoRA(2, 2.0)


def test_a_configuration_of_diffusers_has_the_scale(tmp_path, sites):
    """And one that contradicts the tensors is refused."""
    tensors = {key: value for key, value in lora(key="unet.a.b").items() if "alpha" not in key}
    for fields, expected in (
        ('{"unet.r": 2, "unet.lora_alpha": 8}', jlora.LoRA(2, 8.0)),
        ('{"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"a.b": 3}}', jlora.LoRA(2, 3.0)),
        ('{"text_encoder.r": 4, "text_encoder.lora_alpha": 8}', jlora.LoRA(2, 2.0)),
    ):
        (tmp_path / "a.safetensors").write_bytes(save(tensors, {"lora_adapter_metadata": fields}))
        assert jlora.kohya.load(tmp_path / "a.safetensors", sites, NAMES)["a_b"].method == expected
    for fields, message in (
        ('{"unet.r": 3}', r"LoRA\(rank=3"),
        ('{"unet.use_dora": true}', "has DoRA"),
        ('{"unet.lora_bias": true}', "lora_bias = True"),
        ("[1]", "cannot be read"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "a.safetensors").write_bytes(save(tensors, {"lora_adapter_metadata": fields}))
        with pytest.raises(ValueError, match=message):
            jlora.kohya.load(tmp_path / "a.safetensors", sites, NAMES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_up.weight"), r"unet.a.b: LoRA: missing \['lora_up'\], left over \[\]"),
        (lambda t: t.update({f"{KEY}.what": np.ones(3, np.float32)}), f"does not know: {KEY}.what"),
        (lambda t: t.update(lora(key="lora_unet_a_c")), "lora_unet_a_c: near misses: lora_unet_a_b"),
        (lambda t: t.update(lora(key="unet.a.b")), "has unet.a.b twice, the second time as unet.a.b"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": np.ones((2, 3), np.float32)}), "lora_down of lora_unet_a_b twice"),
        (lambda t: t.update({f"{KEY}.alpha": np.ones(2, np.float32)}), "its alpha is .*one finite number"),
        (lambda t: t.update({f"{KEY}.alpha": np.zeros((), np.float32)}), "its alpha is 0"),
        (lambda t: t.update({f"{KEY}.alpha": np.full((), np.nan, np.float32)}), "its alpha is nan"),
        (lambda t: t.update({f"{KEY}.lora_down.weight": np.ones((2, 5), np.float32)}), r"\(2, 5\), and 2 x 3 was exp"),
        (
            lambda t: t.update({f"{KEY}.lora_down.weight": np.ones((2, 3, 1, 1), np.float32)}),
            r"\(2, 3, 1, 1\), and 2 x",
        ),
        (lambda t: t.update({f"{KEY}.lora_down.weight": np.ones((0, 3), np.float32)}), "rank is a positive integer"),
        (lambda t: t.update({f"{KEY}.lora_down.weight": np.ones(3, np.float32)}), "two axes or more"),
        (lambda t: t.update({f"{KEY}.lora_down.weight": np.ones((2, 3), np.int32)}), "have the dtypes .*int32"),
        (lambda t: t.update({f"{KEY}.scalar": np.ones(1, np.float32)}), "a trained scale of LyCORIS"),
        (lambda t: t.update({f"{KEY}.w_norm": np.ones(4, np.float32)}), "difference for unet.a.b.weight, and no path"),
    ],
)
def test_files_that_are_refused(tmp_path, sites, change, message):
    tensors = lora()
    change(tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        jlora.kohya.load(tmp_path / "a.safetensors", sites, NAMES)


def test_two_names_with_one_spelling(tmp_path):
    params = {"x": jnp.ones((3, 4)), "y": jnp.ones((3, 4))}
    names = {"x": "unet.a.b", "y": "unet.a_b"}
    sites = jlora.trace(lambda p, x: (x @ p["x"], x @ p["y"]), params, jnp.ones((2, 3)))
    save_file(lora(), tmp_path / "a.safetensors")
    message = r"unet.a.b and unet.a_b are both spelled lora_unet_a_b"
    with pytest.raises(ValueError, match=message):
        jlora.kohya.load(tmp_path / "a.safetensors", sites, names)
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(2))
    with pytest.raises(ValueError, match=message):
        jlora.kohya.save(tmp_path / "b.safetensors", adapter, names)
    assert not (tmp_path / "b.safetensors").exists()


def test_two_text_encoders(tmp_path):
    """With two, kohya's scripts number both; both spellings of the first are read."""
    params = {"x": jnp.ones((3, 4)), "y": jnp.ones((3, 4))}
    sites = jlora.trace(lambda p, x: (x @ p["x"], x @ p["y"]), params, jnp.ones((2, 3)))
    names = {"x": "text_encoder.q", "y": "text_encoder_2.q"}
    adapter = jlora.init(jax.random.key(0), sites, jlora.LoRA(2))
    jlora.kohya.save(tmp_path / "two.safetensors", adapter, names)
    assert {key.split(".")[0] for key in load_file(tmp_path / "two.safetensors")} == {"lora_te1_q", "lora_te2_q"}
    assert list(jlora.kohya.load(tmp_path / "two.safetensors", sites, names)) == ["x", "y"]
    jlora.kohya.save(tmp_path / "one.safetensors", {"x": adapter["x"]}, {"x": "text_encoder.q"})
    assert {key.split(".")[0] for key in load_file(tmp_path / "one.safetensors")} == {"lora_te_q"}
    assert list(jlora.kohya.load(tmp_path / "one.safetensors", sites, {"x": "text_encoder.q"})) == ["x"]


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ({"bias": jlora.Full(), "a_b": jlora.LoRA(2)}, {}, "its weight is not trained in full: LyCORIS and kohya"),
        ({"a_b": jlora.Full()}, {"form": "diffusers"}, "a_b has Full, and a file of diffusers"),
        ({"a_b": jlora.Hadamard(4, 2, "tanh")}, {}, "the update of Hadamard"),
        ({"a_b": jlora.DoRA(2)}, {}, "Pass params="),
        ({"a_b": jlora.LoRA(2)}, {"form": "a1111"}, "form is one of kohya, diffusers"),
        ({"a_b": jlora.LoRA(2)}, {"names": {"b": "unet.a"}}, "a_b"),
        ({"a_b": jlora.LoRA(2)}, {"names": {"a_b": Module("unet.a", "conv1d")}}, "is of kind conv1d"),
    ],
)
def test_what_cannot_be_saved(tmp_path, sites, targets, options: dict[str, Any], message):
    adapter = jlora.init(jax.random.key(0), sites, targets)
    adapter = jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape), adapter)
    names = options.pop("names", NAMES) if "names" in options else NAMES
    with pytest.raises(ValueError, match=message):
        jlora.kohya.save(tmp_path / "a.safetensors", adapter, names, **options)
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_replaced(tmp_path, sites):
    adapter = jlora.init(jax.random.key(0), sites, {"a_b": jlora.LoRA(2)})
    jlora.kohya.save(tmp_path / "a.safetensors", adapter, NAMES)
    with pytest.raises(FileExistsError, match="exists"):
        jlora.kohya.save(tmp_path / "a.safetensors", adapter, NAMES)
    with pytest.raises(ValueError, match="empty"):
        jlora.kohya.save(tmp_path / "b.safetensors", {}, NAMES)
    with pytest.raises(ValueError, match="has the scale 0"):
        jlora.kohya.save(tmp_path / "b.safetensors", jlora.scale(adapter, 0), NAMES)
    with pytest.raises(ValueError, match=r"no tensor that 'lora_unet' does not ignore"):
        jlora.kohya.load(tmp_path / "a.safetensors", sites, NAMES, ignore="lora_unet")
    with pytest.raises(FileNotFoundError):
        jlora.kohya.load(tmp_path / "c.safetensors", sites, NAMES)
