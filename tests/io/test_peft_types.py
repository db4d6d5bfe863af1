"""Types of PEFT that share arrays or read the weight, against what `golden/peft_types.py` recorded."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, load_file

import jlora
from tests.support import peft_types
from tests.support.peft_files import change_configuration, change_tensors, settled
from tests.support.recorded import sections

GOLDEN = sections(Path(__file__).parents[1] / "golden" / "peft_types.npz")
STATE, X = GOLDEN["model"]["all"], GOLDEN["input"]["all"]["x"]
PARAMS = peft_types.params_of(STATE)
SITES = peft_types.sites_of(PARAMS)
FOURIER = [-0.09185072, 1.3775651]
FILES = ("adapter_config.json", "adapter_model.safetensors")
# Files that are written again in another form: GLoRA's C, D and E become the bias, a MiSS whose matrix is cut off or
# repeated is the LoRA or the MiSS that it equals, and arrays that train nothing are left out.
OTHER_FORM = (
    *("glora", "glora_vector", "glora_constant", "glora_bias", "miss_of_another_size", "miss_mini"),
    *("osf_of_no_rank", "all_biases"),
)


def unpack(section: str, name: str, folder: Path) -> np.ndarray:
    """Writes the recorded files; returns the recorded output."""
    folder.mkdir()
    for file in FILES:
        (folder / file).write_bytes(GOLDEN[section][name][file].tobytes())
    return GOLDEN[section][name]["y"]


def some(section: str) -> list:
    default = ("tinylora_wide", "unilora", "kasa", "randlora", "glora", "c3a_blocks", "osf_of_no_rank", "all_biases")
    return [pytest.param(name, marks=[] if name in default else [pytest.mark.nightly]) for name in GOLDEN[section]]


@pytest.mark.parametrize("name", some("adapter"))
def test_a_file_of_peft_computes_what_it_does_there_and_is_written_again(name, tmp_path):
    want = unpack("adapter", name, tmp_path / "given")
    adapter = jlora.peft.load(tmp_path / "given", SITES, peft_types.NAMES, params=PARAMS)
    for shared in next(iter(adapter.values())).method.shared_arrays:
        held = [shared in {**update.factors, **update.frozen} for _, update in sorted(adapter.items())]
        assert held == [True, False]
    np.testing.assert_allclose(jlora.adapt(peft_types.apply)(PARAMS, adapter, X), want, atol=2e-5)
    notes = jlora.peft.save(tmp_path / "saved", adapter, peft_types.NAMES, params=PARAMS)
    if name == "qalora":  # PEFT has it for GPTQ layers alone
        assert len(notes) == 2
        return
    assert [note.partition(":")[0] for note in notes] == (["FRoD"] if name == "frod" else [])  # V may be another one
    given, saved = (load_file(tmp_path / folder / FILES[1]) for folder in ("given", "saved"))
    if name == "pvera":  # whose matrices jlora does not draw: it is the LoRA of its mean
        assert {type(update.method) for update in adapter.values()} == {jlora.LoRA}
    elif name == "monteclora":  # the file holds the last draw too
        assert all(
            np.array_equal(given[key], saved[key]) for key in given if not key.endswith(("weights", "var_prior"))
        )
    elif name not in ("vblora_topk", *OTHER_FORM):  # of whose logits the file holds those of the mixed vectors alone
        assert given.keys() == saved.keys()
        for key in given:
            np.testing.assert_allclose(saved[key], given[key], atol=2e-7 if name == "ln_tuning" else 0)
    again = jlora.peft.load(tmp_path / "saved", SITES, peft_types.NAMES, params=PARAMS)
    first, second = (jax.tree.leaves(jlora.merge(PARAMS, a)) for a in (adapter, again))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", some("export"))
def test_an_adapter_is_written_as_peft_has_read_it(name, tmp_path):
    want = unpack("export", name, tmp_path / "given")
    adapter = peft_types.save(name, tmp_path / "saved", STATE)
    given, saved = (load_file(tmp_path / folder / FILES[1]) for folder in ("given", "saved"))
    assert given.keys() == saved.keys()
    for key in given:
        np.testing.assert_allclose(saved[key], given[key], atol=1e-5)
    first, second = (json.loads((tmp_path / folder / FILES[0]).read_text()) for folder in ("given", "saved"))
    assert first == second
    np.testing.assert_allclose(jlora.adapt(peft_types.apply)(PARAMS, adapter, X), want, atol=2e-5)


def test_what_peft_cannot_share_is_written_as_lora(tmp_path):
    """Two groups, a scale, or an offset: PEFT shares one array among all modules and has no scale."""
    targets = {path: jlora.VBLoRA(2, 5, 4, group=path, offset=False) for path in ("layers/kernel", "out/kernel")}
    adapter = jlora.init(jnp.zeros(2, jnp.uint32), SITES, targets)
    notes = jlora.peft.save(tmp_path / "groups", adapter, peft_types.NAMES)
    assert len(notes) == 2
    loaded = jlora.peft.load(tmp_path / "groups", SITES, peft_types.NAMES)
    for path in ("layers", "out"):
        merged = [jlora.merge(PARAMS, a)[path]["kernel"] for a in (adapter, loaded)]
        np.testing.assert_allclose(*merged, atol=1e-6)


def test_rows_of_an_embedding_are_written_as_trained_tokens(tmp_path):
    """Of an output head tied to it, too: PEFT ties the two."""
    params = {"embed": jnp.asarray(np.random.RandomState(0).normal(size=(7, 4)), jnp.float32)}

    def program(params, ids):
        return params["embed"][ids] @ params["embed"].T

    sites = jlora.trace(program, params, np.zeros(3, np.int32))
    adapter = jlora.init(jax.random.key(0), sites, {"embed": jlora.Rows((5, 2))})
    adapter = jax.tree.map(lambda d: d + np.arange(8.0, dtype=np.float32).reshape(2, 4) + 1, adapter)
    names = {"embed": jlora.peft.Module("embed_tokens", "embedding")}
    jlora.peft.save(tmp_path / "adapter", adapter, names, params=params)
    config = json.loads((tmp_path / "adapter" / FILES[0]).read_text())
    assert (config["peft_type"], config["token_indices"]) == ("TRAINABLE_TOKENS", [2, 5])
    loaded = jlora.peft.load(tmp_path / "adapter", sites, names, params=params)
    want = np.array(params["embed"])
    want[[5, 2]] += np.arange(8.0).reshape(2, 4) + 1
    for a in (adapter, loaded):
        np.testing.assert_allclose(jlora.merge(params, a)["embed"], want, atol=1e-6)
    ids = np.array([5, 1])
    np.testing.assert_allclose(jlora.adapt(program)(params, adapter, ids), want[ids] @ want.T, atol=1e-3)


def test_matrices_that_pvera_leaves_out_are_drawn_as_torch_does(tmp_path):
    """The recorded file without its matrices, `save_projection=False`, is the same adapter."""
    unpack("adapter", "pvera", tmp_path / "a")
    expected = jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)
    change_tensors(tmp_path / "a", lambda t: {name: tensor for name, tensor in t.items() if "pvera_lambda" in name})
    with pytest.raises(ValueError, match=r"lacks .*base_model.pvera_A"):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)
    change_configuration(tmp_path / "a", save_projection=False)
    actual = jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("method", [jlora.KaSA(2), jlora.OSF(2)])
def test_singular_vectors_of_another_base_are_refused(method, tmp_path):
    adapter = jlora.init(jnp.zeros(2, jnp.uint32), SITES, {"out/kernel": method}, params=PARAMS)
    other = {**PARAMS, "out": {**PARAMS["out"], "kernel": PARAMS["out"]["kernel"][::-1]}}
    with pytest.raises(ValueError, match="other singular vectors"):
        jlora.peft.save(tmp_path / "a", adapter, peft_types.NAMES, params=other)
    notes = jlora.peft.save(tmp_path / "b", adapter, peft_types.NAMES)
    assert len(notes) == 1


@pytest.mark.parametrize(("peft_type", "reason"), [("PSOFT", "signs"), ("ADAMSS", "clusters")])
def test_types_that_do_not_hold_what_they_mean(peft_type, reason, tmp_path):
    unpack("adapter", "kasa", tmp_path / "a")
    config = json.loads((tmp_path / "a" / FILES[0]).read_text()) | {"peft_type": peft_type}
    (tmp_path / "a" / FILES[0]).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)


@pytest.mark.parametrize("method", [jlora.FourierFT(9), jlora.WaveFT(9)])
def test_places_that_peft_cannot_draw_are_refused(method, tmp_path):
    adapter = jlora.init(jnp.zeros(2, jnp.uint32), SITES, {"out/kernel": method})
    with pytest.raises(ValueError, match=r"out/kernel: .* places='torch'"):
        jlora.peft.save(tmp_path / "a", adapter, peft_types.NAMES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("waveft", {"wavelet_family": "db4"}, "'db4'"), ("waveft", {"use_idwt": False}, "use_idwt = False")],
)
def test_another_transform_is_refused_by_name(name, options, message, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    change_configuration(tmp_path / "a", **options)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES)


@pytest.mark.parametrize(("side", "value"), [(0, 12), (1, 8), (1, -1), (slice(None), 0)])
def test_places_outside_of_the_weight_or_twice_are_refused(side, value, tmp_path):
    """A scatter would leave them out, or one of two."""
    unpack("adapter", "shira", tmp_path / "a")

    def changed(tensors):
        indices = tensors["base_model.model.out.shira_indices"].copy()
        indices[side, :2] = value
        return {**tensors, "base_model.model.out.shira_indices": indices}

    change_tensors(tmp_path / "a", changed)
    with pytest.raises(ValueError, match=r"out\.shira_indices must hold distinct entries of a weight of 12 x 8"):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES)


@pytest.mark.parametrize("places", ["stretches", "torch"])
def test_places_are_distinct_and_the_branch_has_them(places):
    """Of odd sizes, which the Haar transform rounds up."""
    params, x = {"w": jnp.zeros((7, 5))}, jnp.eye(7)
    sites = jlora.trace(lambda p, x: x @ p["w"], params, x)
    for method in (jlora.WaveFT(20, 2.0, 3, places), jlora.FourierFT(20, 2.0, 3, places)):
        adapter = jlora.init(jax.random.key(0), sites, method)
        adapter = jax.tree.map(lambda c: jnp.arange(1.0, 21), adapter)
        y = jlora.adapt(lambda p, x: x @ p["w"])(params, adapter, x)
        np.testing.assert_allclose(y, jlora.merge(params, adapter)["w"], atol=1e-5)
        if places == "torch":  # what PEFT 0.21.2 computes
            first = [19, 19, 35, -15, 12] if isinstance(method, jlora.WaveFT) else [12, *FOURIER, *FOURIER[::-1]]
            np.testing.assert_allclose(y[0], first, atol=1e-5)


if importlib.util.find_spec("peft"):

    def test_live():
        """The golden file holds what its script makes."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tests.golden import peft_types as script

            recorded = script.records()
        flat = {
            f"{s}/{n}/{k}": a for s, names in GOLDEN.items() for n, arrays in names.items() for k, a in arrays.items()
        }
        assert set(recorded) == set(flat)
        for key, expected in flat.items():
            actual = recorded[key]
            if key.endswith(FILES[0]):
                # Which module the class of the model is in depends on how the script was run.
                first, second = (settled(a) | {"auto_mapping": None} for a in (actual, expected))
                assert first == second, key
                continue
            tensors = [load(a.tobytes()) if key.endswith(FILES[1]) else {"": a} for a in (actual, expected)]
            assert tensors[0].keys() == tensors[1].keys(), key
            for name, tensor in tensors[1].items():
                np.testing.assert_allclose(tensors[0][name], tensor, atol=2e-5, err_msg=f"{key} {name}")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("monteclora", {"monteclora_config": {"buffer_size": 3}}, "lacks num_samples: add it"),
        ("monteclora", {"use_dora": True}, "monteclora_config and use_dora: PEFT takes one"),
        ("kasa", {"use_dora": True}, "kasa_config, use_dora: PEFT takes one"),
        ("hra_biases", {"bias": "some"}, "must be none, all or hra_only"),
        ("pvera", {"projection_prng_key": "3"}, "projection_prng_key = '3', and it must be an integer"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, fields, message, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    change_configuration(tmp_path / "a", **fields)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)


def test_super_tuning_has_as_many_entries_as_in_peft(tmp_path):
    """PEFT has 11 of 120 at the sparsity 0.9, because 1 - 0.9 is a little less than 0.1; jlora has 12."""
    params = {"w": jnp.arange(120.0).reshape(12, 10)}
    sites = jlora.trace(lambda p, x: x @ p["w"], params, jnp.ones((2, 12)))
    adapter = jlora.init(jax.random.key(0), sites, {"w": jlora.SuperTuning(0.9)}, params=params)
    adapter = jax.tree.map(lambda a: a + 1, adapter)
    jlora.peft.save(tmp_path / "12", adapter, {"w": "w"})
    config = json.loads((tmp_path / "12" / FILES[0]).read_text())
    assert int(120 * (1 - config["sparsity"])) == adapter["w"].factors["s"].size == 12
    change_tensors(tmp_path / "12", lambda tensors: {name: t[:11] for name, t in tensors.items()})
    change_configuration(tmp_path / "12", sparsity=0.9)
    loaded = jlora.peft.load(tmp_path / "12", sites, {"w": "w"})
    assert loaded["w"].factors["s"].size == 11
    jlora.peft.save(tmp_path / "11", loaded, {"w": "w"})
    assert int(120 * (1 - json.loads((tmp_path / "11" / FILES[0]).read_text())["sparsity"])) == 11


def one_place(tensor):
    """Indices of one place, and a scale for each entry."""
    values = np.arange(tensor.size).reshape(tensor.shape)
    return (values * (tensor.dtype != np.int64)).astype(tensor.dtype)


@pytest.mark.parametrize(
    ("name", "tensor", "change", "message"),
    [
        ("unilora", "layers.0.unilora_scales_A", None, "lacks a tensor, .*unilora_scales_A"),
        ("unilora", "layers.0.unilora_", one_place, "differ from others for one index"),
        ("unilora", "layers.0.unilora_indices_A", lambda t: t + 900, "out of range"),
        ("unilora", "layers.0.unilora_indices_A", lambda t: t[:1], "and its scales"),
        ("pvera", "out.pvera_lambda_d", lambda t: t[1:], "has length 5, and it is two vectors"),
        ("peanut_deep", "out.peanut_encoders.0.weight", lambda t: t[:1], "several shapes"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name, tensor, change, message, tmp_path):
    unpack("adapter", name, tmp_path / "a")
    key = f"base_model.model.{tensor}"

    def changed(tensors):
        hit = {k for k in tensors if k.startswith(key)}
        return {k: change(t) if k in hit else t for k, t in tensors.items() if k not in hit or change is not None}

    change_tensors(tmp_path / "a", changed)
    with pytest.raises(ValueError, match=message):
        jlora.peft.load(tmp_path / "a", SITES, peft_types.NAMES, params=PARAMS)
