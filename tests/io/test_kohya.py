"""Files of kohya, LyCORIS and diffusers in jlora, and of jlora in those: the weights that `golden/kohya.py` has."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

import jlora
from jlora.kohya import Module
from tests.support.kohya_files import (
    BOUND,
    EXPORTS,
    Program,
    error,
    exported,
    golden,
    program,
    weights,
    write,
)

LIBRARIES = ("diffusers", "lycoris", "loralib")
OF_ENCODER = r"lora_te_.*"


def kinds(name: str) -> list[str]:
    """The programs that a recorded file is read into: Linen, and for some files the two others."""
    return ["linen", *(["torch", "nnx"] if name in ("mixed", "diffusers") else [])]


READS = [(name, kind) for name in golden()["adapter"] if name != "bare" for kind in kinds(name)]
IN_DEFAULT = ("mixed-linen", "diffusers-torch", "diffusers-nnx", "old_diffusers-linen", "diffusers")


def cases(*all_of: Any) -> list[Any]:
    """All cases, of which the default run takes a few."""
    names = [case if isinstance(case, str) else "-".join(case) for case in all_of]
    marks = [() if name in IN_DEFAULT else pytest.mark.nightly for name in names]
    parts = [(case,) if isinstance(case, str) else case for case in all_of]
    return [pytest.param(*p, id=name, marks=m) for p, name, m in zip(parts, names, marks, strict=True)]


@pytest.mark.parametrize(("name", "kind"), cases(*READS))
def test_from_other_libraries(tmp_path, name, kind):
    """What LyCORIS and diffusers merge is what jlora merges; and saving what was read changes no weight."""
    recorded, at = golden()["adapter"][name], program(kind)
    file = write(recorded["file"], tmp_path / "given.safetensors")
    ignore = None if kind == "linen" else OF_ENCODER
    adapter = jlora.kohya.load(file, at.sites, at.names, params=at.params, ignore=ignore)
    check_merged(adapter, at, recorded)
    jlora.kohya.save(tmp_path / "saved.safetensors", adapter, at.names, params=at.params)
    again = jlora.kohya.load(tmp_path / "saved.safetensors", at.sites, at.names, params=at.params)
    check_merged(again, at, recorded)


@pytest.mark.parametrize("name", ["mixed", "more", "convolutions", "diffusers", "kohya"])
def test_info(tmp_path, name):
    """The norms are those of the recorded differences; LoKr and DoRA of a convolution included."""
    recorded = golden()["adapter"][name]
    report = jlora.info(write(recorded["file"], tmp_path / "a.safetensors"))
    assert (report.format, report.refused) == ("diffusers" if name == "diffusers" else "kohya or LyCORIS", ())
    norms = {spelled(u.path): u.norm for u in report.adapters[""].updates if not isinstance(u.method, jlora.DoRA)}
    expected = {key.removeprefix("merged "): value for key, value in recorded.items() if key != "file"}
    for key, value in expected.items():
        if (norm := norms.pop(spelled(key), None)) is not None:
            np.testing.assert_allclose(norm, np.linalg.norm(value - weights()[key]), rtol=1e-4)
    assert not norms


def spelled(name: str) -> str:
    """A key or a name, alike for both."""
    name = name.replace("lora_unet", "unet").replace("lora_te", "text_encoder").replace(".", "_")
    return name.removesuffix("_weight")


@pytest.mark.parametrize("name", golden()["refused"])
def test_info_names_what_is_refused(tmp_path, name):
    report = jlora.info(write(golden()["refused"][name]["file"], tmp_path / "a.safetensors"))
    assert bool(report.refused) == (name != "unbalanced")  # which depends on the axes of the weight


def check_merged(adapter: jlora.Adapter, at: Program, recorded: dict[str, np.ndarray]) -> None:
    """Every recorded weight is merged so, and no other weight changes."""
    merged = at.torch(jlora.merge(at.params, adapter))
    expected = {key.removeprefix("merged "): value for key, value in recorded.items() if key != "file"}
    assert expected
    for key, value in merged.items():
        assert error(value, expected.get(key, weights()[key])) <= BOUND, key


@pytest.mark.parametrize("name", cases(*EXPORTS))
def test_to_other_libraries(tmp_path, name):
    """What jlora writes is what LyCORIS or diffusers merged to the same weights."""
    recorded, at = golden()["export"][name], program("linen")
    adapter = exported(name, at.sites)
    check_merged(adapter, at, recorded)
    file = tmp_path / "a.safetensors"
    jlora.kohya.save(file, adapter, at.names, params=at.params, form=EXPORTS[name].form)
    assert file.read_bytes() == recorded["file"].tobytes()


def test_a_single_model(tmp_path):
    """LyCORIS on any model of torch: the names have no component, the keys the prefix "lycoris"."""
    recorded, at = golden()["adapter"]["bare"], program("linen")
    names = {"params/te_query": "text_model.encoder.layers.{i}.self_attn.q_proj"}
    adapter = jlora.kohya.load(write(recorded["file"], tmp_path / "a.safetensors"), at.sites, names)
    check_merged(adapter, at, recorded)
    jlora.kohya.save(tmp_path / "b.safetensors", adapter, names)
    tensors = load_file(tmp_path / "b.safetensors")
    assert all(key.startswith("lycoris_text_model_encoder_layers_") for key in tensors)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tucker", "conv1: it has hada_t1, the Tucker form of LoHa"),
        ("wd_on_in", r"to_k: its magnitudes have the shape \(1, 10\).*wd_on_out=True"),
        ("wd_loha", "to_k: it has dora_scale beside .*jlora has DoRA of LoRA alone"),
        ("ia3", "IA3 of LyCORIS"),
        ("oft", "OFT of LyCORIS"),
        ("glora", "GLoRA of LyCORIS"),
        ("unbalanced", r"proj: its Kronecker product has a first factor of 12 x 2, and no LoKr of jlora"),
    ],
)
def test_methods_that_are_refused(tmp_path, name, message):
    at = program("linen")
    file = write(golden()["refused"][name]["file"], tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        jlora.kohya.load(file, at.sites, at.names, params=at.params)


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


if all(importlib.util.find_spec(library) for library in LIBRARIES):

    def test_live():
        """The golden file holds what its script makes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tests.golden import kohya

            recorded = kohya.records()
        flat = {
            f"{s}/{n}/{k}": a for s, names in golden().items() for n, arrays in names.items() for k, a in arrays.items()
        }
        assert set(recorded) == set(flat)
        for key, expected in flat.items():
            if key.endswith("/file"):
                assert recorded[key].tobytes() == expected.tobytes(), key
            else:
                assert error(recorded[key], expected) <= BOUND, key
