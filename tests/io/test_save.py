"""Saved adapters: exact, self-describing, and refused if altered."""

import dataclasses
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jlora
from jlora.io.checkpoint import metadata as _describe
from jlora.methods import _registry
from tests.support import toy_model
from tests.support.checkpoints import GOLDEN, same, varied
from tests.support.methods import METHODS, fitting


@pytest.fixture
def saved(tmp_path):
    adapter = toy_model.adapter()
    jlora.save(tmp_path / "a", adapter)
    return tmp_path / "a", adapter


@pytest.mark.drawn(2)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("method", [jlora.LoRA(rank=2, alpha=3.0, dropout=0.1), jlora.Full()], ids=repr)
def test_round_trip(tmp_path, dtype, method):
    initial = jlora.init(jax.random.key(0), toy_model.sites(), {"mix/kernel|embed|layers/up": method}, dtype=dtype)
    adapter = toy_model.nonzero(initial)
    jlora.save(tmp_path / "a", jlora.with_dropout(adapter, jax.random.key(1)))
    same(jlora.load(str(tmp_path / "a")), adapter)


def metadata_of(folder):
    return json.loads((folder / "jlora" / "metadata").read_text())


def test_it_describes_itself(saved):
    meta = metadata_of(saved[0])
    assert meta["format"] == 3
    assert set(meta["versions"]) == {"jlora", "jax", "orbax-checkpoint"}
    update = meta["updates"]["layers/up"]
    method = meta["methods"][update["method"]]
    assert method["name"] == "LoRA"
    assert method["hyperparameters"]["rank"] == 2
    assert method["hyperparameters"]["alpha"] == 3.0
    assert update["roles"] == ["stack", "in", "out"]
    assert update["shape"] == [toy_model.LAYERS, toy_model.WIDTH, toy_model.HIDDEN]
    array = meta["arrays"][update["factors"]["a"]]
    assert array["shape"] == [toy_model.LAYERS, toy_model.WIDTH, 2]
    assert array["dtype"] == "float32"
    assert meta["base"] is None


@pytest.mark.parametrize(("layers", "size"), [(1, 512), (24, 384)])
def test_only_the_adapter_is_stored(tmp_path, layers, size):
    """For one weight, and for as many as a small encoder has, with the fingerprint of the base."""
    params = {f"layer_{k}/attention/query/kernel": jnp.ones((size, size)) for k in range(layers)}

    def model(params, x):
        return functools.reduce(jnp.matmul, params.values(), x)

    sites = jlora.trace(model, params, jnp.ones((1, size)))
    adapter = toy_model.random_adapter(sites, jlora.LoRA(rank=8))
    jlora.save(tmp_path / "a", adapter, params=params)
    stored = sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())
    assert stored <= 1.05 * sum(a.nbytes for a in jax.tree.leaves(adapter)) + 64 * 1024


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no saved adapter at .*nowhere"):
        jlora.load(tmp_path / "nowhere")


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(jlora.CheckpointError, match="not a saved adapter"):
        jlora.load(tmp_path)


def test_nothing_is_overwritten(saved):
    with pytest.raises(FileExistsError, match="exists"):
        jlora.save(saved[0], saved[1])
    with pytest.raises(ValueError, match="empty"):
        jlora.save(saved[0].parent / "b", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format=4), r"format 4, and this release of jlora reads up to 3; upgrade"),
        (lambda meta: meta.update(format=0), "altered"),
        (lambda meta: meta["methods"][0]["hyperparameters"].update(alpha=4.0), "altered"),
        (lambda meta: meta.pop("format"), "damaged"),
        (lambda meta: meta.pop("sha256"), "damaged"),
    ],
)
def test_altered_metadata(saved, change, message):
    file = saved[0] / "jlora" / "metadata"
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))
    with pytest.raises(jlora.CheckpointError, match=message):
        jlora.load(saved[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.pop("updates"),
        lambda meta: meta["updates"]["embed"].pop("roles"),
        lambda meta: meta["updates"]["embed"].update(method=7),
        lambda meta: meta["updates"]["embed"]["factors"].update(a="none"),
        lambda meta: meta["arrays"]["embed:factors:a"]["sums"].append(0),
        lambda meta: meta["arrays"]["embed:factors:a"].update(shape=[3]),
        lambda meta: meta["arrays"]["embed:factors:a"].update(dtype="float7"),
        lambda meta: meta["arrays"].update({"embed:factors:a": 3}),
        lambda meta: meta["methods"][0]["hyperparameters"].update(rank=-1),
        lambda meta: meta["methods"][0]["hyperparameters"].update(unheard_of=1),
    ],
)
def test_metadata_that_another_program_wrote(saved, change):
    """Their checksum is correct, and their contents are not."""
    file = saved[0] / "jlora" / "metadata"
    meta = json.loads(file.read_text())
    del meta["sha256"]
    change(meta)
    file.write_text(json.dumps(meta | {"sha256": _describe._digest(meta)}))
    with pytest.raises(jlora.CheckpointError):
        jlora.load(saved[0])
    with pytest.raises(jlora.CheckpointError):
        jlora.load(saved[0], params=toy_model.params())


def test_an_unknown_method(saved, monkeypatch):
    monkeypatch.setattr(_registry, "_CLASSES", {})
    with pytest.raises(jlora.CheckpointError, match="'LoRA' is not known: upgrade jlora, or import the module"):
        jlora.load(saved[0])


FORMATS = ["1", "2", "3"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_that_was_ever_released(name):
    """A checkpoint of each format is kept. A new format adds a folder; no folder changes."""
    same(jlora.load(GOLDEN / name), varied())
    same(jlora.load(GOLDEN / name, params=toy_model.params()), varied())
    assert [path.name for path in sorted(GOLDEN.iterdir()) if path.name.isdecimal()] == FORMATS


def test_nothing_is_unpickled(saved, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    same(jlora.load(saved[0]), saved[1])


def test_values_that_json_does_not_hold(tmp_path):
    update = toy_model.adapter()["embed"]
    jlora.save(tmp_path / "a", {"embed": dataclasses.replace(update, scale=jnp.float32(0.5))})
    assert jlora.load(tmp_path / "a")["embed"].scale == 0.5
    unserializable = dataclasses.replace(update, method=jlora.LoRA(rank=2, a_init=jax.nn.initializers.zeros))
    with pytest.raises(ValueError, match="Only numbers, strings"):
        jlora.save(tmp_path / "b", {"embed": unserializable})


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn]
PATHS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["", "/", "..", "a//b", "a:b", "%2F"])


@given(data=st.data())
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_adapter_comes_back(tmp_path_factory, data):
    """Random methods, shapes, stacks, dtypes and paths come back exactly."""
    paths = data.draw(st.lists(PATHS, min_size=1, max_size=3, unique=True))
    adapter = {}
    for path in paths:
        sizes = [data.draw(st.sampled_from([6, 8, 12])) for _ in range(2)]
        layers = data.draw(st.sampled_from([None, 1, 3]))
        shape = (*([] if layers is None else [layers]), *sizes)

        def model(w, x):
            return x @ w if w.ndim == 2 else jax.lax.scan(lambda x, w: (x, x @ w), x, w)[1]

        sites = jlora.trace(model, jnp.ones(shape), jnp.ones((1, sizes[0])))
        method = fitting(data.draw(st.sampled_from(sorted(METHODS))), sites[""])
        dtype = data.draw(st.sampled_from(DTYPES))
        targets = {"": method}
        initial = jax.eval_shape(
            lambda w, sites=sites, targets=targets: jlora.init(jax.random.key(0), sites, targets, params=w),
            jnp.ones(shape),
        )
        seed = data.draw(st.integers(0, 9))
        values = jax.tree.map(lambda a, dtype=dtype: jnp.asarray(a, dtype), toy_model.nonzero(initial, seed))
        adapter[path] = jlora.scale(values, data.draw(st.sampled_from([1.0, 0.1, -2.0])))[""]
    folder = tmp_path_factory.mktemp("any") / "a"
    jlora.save(folder, adapter)
    same(jlora.load(folder), adapter)


def test_the_same_base(tmp_path):
    adapter, params = toy_model.adapter(), toy_model.params()
    jlora.save(tmp_path / "a", adapter, params=params, hashes=True)
    same(jlora.load(tmp_path / "a", params=params), adapter)
    abstract = jax.eval_shape(toy_model.params)
    same(jlora.load(tmp_path / "a", params=abstract), adapter)
    same(jlora.load(tmp_path / "a"), adapter)


def test_another_base_is_refused_with_every_difference(tmp_path):
    adapter, params = toy_model.adapter(), toy_model.params()
    jlora.save(tmp_path / "a", adapter, params=params, hashes=True)
    other = toy_model.params()
    other["layers"]["up"] = other["layers"]["up"][:, :, :-1]
    other["layers"]["bias"] = other["layers"]["bias"].astype(jnp.bfloat16)
    other["mixer"] = other.pop("mix")
    other["embed"] = other["embed"].at[3, 4].add(1e-3)
    with pytest.raises(jlora.CheckpointError) as caught:
        jlora.load(tmp_path / "a", params=other)
    for line in (
        "layers/up: made for shape [3, 8, 12], found [3, 8, 11]",
        "layers/bias: made for dtype float32, found bfloat16",
        "mix/kernel: no such parameter (near misses: mixer/kernel",
        "mixer/kernel: a parameter that the base did not have",
        "embed: base values differ from those recorded",
    ):
        assert line in str(caught.value)
    assert "down" not in str(caught.value)


def test_another_base_without_a_fingerprint(saved):
    """The adapted weights must exist and have the same shape."""
    params = toy_model.params()
    params["embed"] = params["embed"][:-1]
    params["extra"] = params["embed"]
    with pytest.raises(jlora.CheckpointError, match=r"embed: made for shape \[11, 8\], found \[10, 8\]$"):
        jlora.load(saved[0], params=params)


def test_a_base_is_checked_before_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        jlora.save(tmp_path / "a", toy_model.adapter(), params={"embed": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="pass params too"):
        jlora.save(tmp_path / "a", toy_model.adapter(), hashes=True)
    with pytest.raises(ValueError, match="no values to hash"):
        jlora.save(tmp_path / "a", toy_model.adapter(), params=jax.eval_shape(toy_model.params), hashes=True)
    assert not list(tmp_path.iterdir())
