"""The sweep of ranks and learning rates: each member equals its own separate run, and a stopped sweep continues."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
import minilm
import reviews
import sweep
import sweep_report
import sweep_runs
from sweep_runs import Run

TRAIN, HELD_OUT = 12, 5


def split(seed, count):
    rng = np.random.default_rng(seed)
    mask = (np.arange(6) < rng.integers(2, 7, (count, 1))).astype(np.int32)
    return reviews.Split(rng.normal(size=(count, 6, 8)).astype(np.float32), mask, rng.integers(0, 2, count))


@pytest.fixture(autouse=True)
def promotion():
    """Optax promotes dtypes, and encoders promote ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def encode(params, x, mask):
    """A layer of attention and MLP, and the logits of two classes: a small copy of what the sweep trains."""
    attention, mlp = params["layer"]["attention"], params["layer"]["feed_forward"]
    scores = (x @ attention["query"]["kernel"]) @ (x @ attention["key"]["kernel"]).mT
    weights = jax.nn.softmax(jnp.where(mask[:, None] > 0, scores, -1e9))
    x = x + weights @ x
    x = x + jnp.tanh(x @ mlp["up"]["kernel"] + mlp["up"]["bias"]) @ mlp["down"]["kernel"]
    return (x * mask[..., None]).sum(1)[:, :2]


@pytest.fixture(scope="module")
def task():
    normal = np.random.default_rng(2).normal

    def kernel(*shape):
        return {"kernel": jnp.asarray(normal(size=shape) / 3, jnp.float32)}

    layer = {
        "attention": {"query": kernel(8, 8), "key": kernel(8, 8)},
        "feed_forward": {"up": kernel(8, 12) | {"bias": jnp.ones(12)}, "down": kernel(12, 8)},
    }
    train, held_out = (sweep_runs.on_device(split(seed, count)) for seed, count in ((0, TRAIN), (1, HELD_OUT)))
    return sweep_runs.Task(encode, {"layer": layer}, train, held_out)


def separate_run(task, weights):
    """A run by plain JAX, (trained, rate, rows) -> losses and accuracy; `weights(trained)` are the parameters."""

    def measure(trained, states, mask, labels):
        logits = task.apply(weights(trained), states, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), (logits.argmax(-1) == labels).mean()

    @jax.jit
    def run(trained, rate, rows):
        tx = optax.adam(rate)

        def step(carry, rows):
            trained, state = carry
            batch = [array[rows] for array in task.train]
            (loss, _), gradients = jax.value_and_grad(measure, has_aux=True)(trained, *batch)
            updates, state = tx.update(gradients, state, trained)
            return (optax.apply_updates(trained, updates), state), loss

        (trained, _), losses = jax.lax.scan(step, (trained, tx.init(trained)), rows)
        return losses[-1], *measure(trained, *task.held_out)  # of three steps, the last quarter is one

    return run


def by_hand(task, run):
    """What LoRA is: a function from factors to W + 32 / rank * A B."""
    flat, tree = jax.tree.flatten_with_path(task.params)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]

    def weights(factors):
        assert set(factors) == {path for path in paths if re.fullmatch(sweep_runs.LAYERS[run.layers], path)}
        products = {path: 32 / run.rank * (f["a"] @ f["b"]) for path, f in factors.items()}
        merged = [weight + products.get(path, 0) for path, (_, weight) in zip(paths, flat, strict=True)]
        return jax.tree.unflatten(tree, merged)

    return weights


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["lora", "full"])
def test_a_member_equals_its_own_separate_run(task, full):
    """Beside it in the bank is a member with another rate, seed and, of LoRA, rank: ranks are padded."""
    ranks, layers = ((None, None), "all") if full else ((1, 3), "MLP")
    runs = [Run(rank, layers, 4, seed, rate) for rank, seed, rate in zip(ranks, (5, 1), (3e-3, 3e-2), strict=True)]
    trainer = sweep_runs.Trainer(task)
    record, other = trainer.train(runs)
    if full:
        weights, trained, sizes = (lambda params: params), task.params, [8 * 16 + 2 * 8 * 12 + 12] * 2
    else:
        factors = {path: update.factors for path, update in trainer.start(tuple(runs))[0]["0"].items()}
        weights, trained, sizes = by_hand(task, runs[0]), factors, [2 * 20, 3 * 2 * 20]
    rows = np.random.default_rng(5).permutation(TRAIN).reshape(3, 4)
    expected = separate_run(task, weights)(trained, 3e-3, rows)
    values = [record[key] for key in ("train_loss", "loss", "accuracy")]
    np.testing.assert_allclose(values, expected, rtol=0, atol=3e-5)
    assert record["loss"] != other["loss"]
    assert [record["parameters"], other["parameters"]] == sizes
    assert {field: record[field] for field in dataclasses.asdict(runs[0])} == dataclasses.asdict(runs[0])


class Recorder:
    """Trains nothing, and records what it is asked to train; stops as a user does once `last` banks are trained."""

    def __init__(self, last=None):
        self.trained, self.last = [], last

    def __call__(self, runs):
        if len(self.trained) == self.last:
            raise KeyboardInterrupt
        self.trained.append(list(runs))
        return [dataclasses.asdict(run) | {"loss": run.rate} for run in runs]


def test_a_stopped_sweep_continues_with_what_is_missing(tmp_path):
    groups = list(sweep.banks(sweep.plan((1, 4), (0, 1)), members=4))
    out = tmp_path / "results" / "sweep.json"
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(Recorder(last=2), groups, out, {"runs": []})
    stopped = json.loads(out.read_text())
    assert len(stopped["runs"]) == len(groups[0]) + len(groups[1])
    rest = Recorder()
    sweep.sweep(rest, groups, out, stopped)
    assert rest.trained == groups[2:]
    whole = tmp_path / "whole.json"
    sweep.sweep(Recorder(), groups, whole, {"runs": []})
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    again = Recorder()
    sweep.sweep(again, groups, out, json.loads(out.read_text()))
    assert again.trained == []


@pytest.mark.parametrize("mixed", [False, True])
def test_every_run_is_in_one_bank(mixed):
    runs = sweep.plan(sweep.RANKS, sweep.SEEDS)
    assert len(set(runs)) == len(runs)
    groups = list(sweep.banks(runs, 7, mixed))
    assert sorted(map(repr, runs)) == sorted(repr(run) for group in groups for run in group)
    assert max(map(len, groups)) == (7 if mixed else 5)
    for group in groups:
        assert len({(run.rank is None, run.layers, run.batch) for run in group}) == 1
        assert mixed or len({(run.rank, run.seed) for run in group}) == 1


def test_kinds_of_layers_train_equally_many_numbers():
    encoder = minilm.MiniLM(
        vocabulary=9, positions=24, types=2, width=384, layers=6, heads=12, hidden=1536, epsilon=1e-12
    )
    upper = minilm.Upper(encoder, 4)
    inputs = jax.ShapeDtypeStruct((1, 4, 384), jnp.float32), jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(upper.init, jax.random.key(0), *inputs)
    sites = jlora.trace(upper.apply, params, *inputs)
    sizes = []
    for layers, rank in sweep.EQUAL.items():
        targets = {sweep_runs.LAYERS[layers]: jlora.LoRA(rank)}
        adapter = jax.eval_shape(lambda targets=targets: jlora.init(jax.random.key(0), sites, targets))
        sizes.append(sum(factor.size for update in adapter.values() for factor in update.factors.values()))
    assert sizes == [276_480] * 3


def test_the_table_compares_with_full_fine_tuning():
    def records(rank, losses):
        settings = {"rank": rank, "layers": "all", "batch": 8, "parameters": 1000, "accuracy": 0.5}
        return [
            settings | {"seed": seed, "rate": rate, "loss": loss + 0.02 * seed}
            for rate, loss in losses.items()
            for seed in (0, 1)
        ]

    runs = records(1, {1e-4: 0.6, 1e-3: 0.45, 4e-3: 0.46}) + records(None, {1e-5: 0.5, 1e-4: 0.4, 1e-3: 0.42})
    assert sweep_report.table(runs).splitlines()[2:] == [
        "| full fine-tuning | all | 8 | 1,000 | 1e-04 |  | 0.410 |  | 50.0% |",
        "| rank 1 | all | 8 | 1,000 | 1e-03 to 4e-03 | 20.0 | 0.460 | +0.050 (+0.050 to +0.050) | 50.0% |",
    ]
