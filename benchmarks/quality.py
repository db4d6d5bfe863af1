"""What every method learns: film reviews with MiniLM-L6, at about as many trained parameters as LoRA of rank 8.

    PYTHONPATH=examples python -m benchmarks.quality                # every method, three seeds: an hour on two cores
    PYTHONPATH=examples python -m benchmarks.quality --methods LoRA DoRA --seeds 0

The task is that of examples/finetune_reviews.py: one epoch, on sentences cut to 32 tokens. The upper half of the
encoder is adapted; the outputs of the lower half are computed once. The evaluated model has the adapter merged into it.
Every result is written at once, and a run that was stopped continues with the next one. A method that learns less than
the frozen encoder is assumed to have a bug.
"""

import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from tqdm import tqdm

import assets
import jlora
import minilm
import reviews
from benchmarks import _measure
from training import History, accuracy, apply_head, fit, fit_head, init_head, predict

matplotlib.use("agg")
from matplotlib import pyplot

TARGETS = r"params/layer_\d+/(attention|feed_forward)/\w+/kernel"

# Each with its peak learning rate: that of examples/finetune_reviews.py, or a higher one for small methods.
METHODS: dict[str, tuple[jlora.Method, float]] = {
    "LoRA": (jlora.LoRA(8, 16.0), 2e-3),
    "LoRA-FA": (jlora.LoRA(16, 32.0, freeze_a=True), 2e-3),
    "PiSSA": (jlora.LoRA(8, start="pissa"), 2e-3),
    "MiLoRA": (jlora.LoRA(8, start="milora"), 2e-3),
    "MiCA": (jlora.LoRA(16, start="mica"), 5e-3),
    "OLoRA": (jlora.LoRA(8, start="olora"), 2e-3),
    "orthogonal": (jlora.LoRA(8, 16.0, start="orthogonal"), 2e-3),
    "DoRA": (jlora.DoRA(8, 16.0), 2e-3),
    "Additive": (jlora.Additive(8), 5e-4),
    "Hadamard, k = 2": (jlora.Hadamard(8, 2, alpha=16.0), 2e-3),
    "Hadamard of additive": (jlora.Hadamard(8, 2, "additive"), 5e-4),
    "Hadamard of tanh": (jlora.Hadamard(8, 2, "tanh", 16.0), 2e-3),
    "Hadamard of sigmoid": (jlora.Hadamard(8, 2, "sigmoid", 16.0), 2e-3),
    "LoHa": (jlora.LoHa(4, 8.0), 2e-3),
    "LoKr": (jlora.LoKr(None, factor=6), 2e-3),
    "VeRA": (jlora.VeRA(256), 1e-2),
    "AdaLoRA": (jlora.AdaLoRA(8, 16.0), 2e-3),
    "LoRA-XS": (jlora.LoRAXS(96), 1e-3),
    "MiSS": (jlora.MiSS(16), 1e-3),
    "DeLoRA": (jlora.DeLoRA(8, reach=4.0), 2e-3),
    "HRA": (jlora.HRA(16), 1e-2),
    "IA3": (jlora.IA3(), 1e-2),
    "TinyLoRA": (jlora.TinyLoRA(8, 256), 1e-2),
    "VB-LoRA": (jlora.VBLoRA(4, 90, 128), 1e-2),
    "Uni-LoRA": (jlora.UniLoRA(4, 16384), 5e-3),
    "MonteCLoRA": (jlora.MonteCLoRA(8, 16.0), 2e-3),
    "PVeRA": (jlora.PVeRA(256), 1e-2),
    "PEANuT": (jlora.PEANuT(8), 2e-3),
    "GraLoRA": (jlora.GraLoRA(8, 2, 16.0), 2e-3),
    "BD-LoRA": (jlora.BDLoRA(8, 4, alpha=16.0), 2e-3),
    "QA-LoRA": (jlora.QALoRA(16, 32, 2.0), 2e-3),
    "KaSA": (jlora.KaSA(8), 2e-3),
    "PSOFT": (jlora.PSOFT(96), 5e-3),
    "OSF": (jlora.OSF(8), 2e-3),
    "AdaMSS": (jlora.AdaMSS(96, 8, 8), 5e-3),
    "GLoRA": (jlora.GLoRA(8), 2e-3),
    "OFT": (jlora.OFT(32), 1e-3),
    "BOFT": (jlora.BOFT(16, 2), 1e-3),
    "RoAd": (jlora.RoAd(1, 64), 1e-2),
    "DEFT": (jlora.DEFT(8), 1e-3),
    "PaRa": (jlora.PaRa(16), 1e-3),
    "HiRA": (jlora.HiRA(8, 16.0), 1e-2),
    "FourierFT": (jlora.FourierFT(9216), 3e-3),
    "WaveFT": (jlora.WaveFT(9216), 4e-4),
    "C3A": (jlora.C3A(32), 1e-1),
    "RandLoRA": (jlora.RandLoRA(24, 48.0), 2e-3),
    "FRoD": (jlora.FRoD(0.06), 5e-3),
    "Super-Tuning": (jlora.SuperTuning(0.95), 5e-3),
    "SHiRA": (jlora.SHiRA(8), 5e-3),
}


class Task:
    """The upper half of the encoder, and the outputs of the lower half for every sentence."""

    def __init__(self) -> None:
        folder = assets.minilm()
        encoder, variables = minilm.load(folder)
        first = encoder.layers // 2
        self.width, self.model = encoder.width, minilm.Upper(encoder, first)
        self.variables = {
            "params": {f"layer_{i}": variables["params"][f"layer_{i}"] for i in range(first, encoder.layers)}
        }
        lower = minilm.lower(encoder, first)

        def encode(split: reviews.Split, length: int = 32, batch: int = 100) -> reviews.Split:
            ids, mask = split.ids[:, :length], split.mask[:, :length]
            parts = [slice(start, start + batch) for start in range(0, len(ids), batch)]
            states = np.concatenate([np.asarray(lower(variables, ids[part], mask[part])) for part in parts])
            return reviews.Split(states, mask, split.labels)

        train, _, test = reviews.load(assets.reviews(), folder / "tokenizer.json")
        self.train, self.test = encode(train), encode(test)
        self.sites = jlora.trace(self.model.apply, self.variables, self.train.ids[:1], self.train.mask[:1])
        self.embed = jax.jit(lambda _, variables, states, mask: self.model.apply(variables, states, mask))

    def accuracy(self, head: Any, variables: Any) -> float:
        """The share of test sentences that are classified correctly."""
        features = predict(self.embed, None, variables, self.test)
        return accuracy(jax.device_get(apply_head(head, features)), self.test.labels)

    def run(self, name: str, seed: int, steps: int) -> dict[str, Any]:
        """Trains one method with one seed; returns its accuracy, parameters and seconds."""
        if name == FROZEN:
            head = init_head(jax.random.split(jax.random.key(seed))[0], self.width, classes=2)
            head = fit_head(predict(self.embed, None, self.variables, self.train), self.train.labels, head)
            return {"accuracy": self.accuracy(head, self.variables), "parameters": 0, "seconds": 0.0}

        method, learning_rate = METHODS[name]
        adapter, head, history = self.fit({TARGETS: method}, seed, steps, learning_rate, f"{name}, seed {seed}")
        return {
            "accuracy": self.accuracy(head, jlora.merge(self.variables, adapter)),
            "loss": statistics.mean(history.losses[-20:]),
            "parameters": sum(f.size for update in adapter.values() for f in update.factors.values()),
            "learning_rate": learning_rate,
            "seconds": history.seconds,
        }

    def fit(
        self, targets: dict[str, jlora.Method], seed: int, steps: int, learning_rate: float, name: str
    ) -> tuple[jlora.Adapter, Any, History]:
        """Trains an adapter of these targets and a head; returns both, and the losses of the steps."""
        head_key, adapter_key = jax.random.split(jax.random.key(seed))
        head = init_head(head_key, self.width, classes=2)
        adapter = jlora.init(adapter_key, self.sites, targets, params=self.variables)
        adapted = jlora.adapt(self.model.apply, on_dense="allow")

        def logits(trainable: Any, variables: Any, states: jax.Array, mask: jax.Array) -> jax.Array:
            return apply_head(trainable["head"], adapted(variables, trainable["adapter"], states, mask))

        trained, history = fit(
            logits,
            {"adapter": adapter, "head": head},
            self.variables,
            self.train,
            None,
            name=name,
            learning_rate=learning_rate,
            steps=steps,
            seed=seed,
        )
        return trained["adapter"], trained["head"], history


FROZEN = "frozen encoder"


def show(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Prints the table and draws the picture, the best method first."""
    means = {name: statistics.mean(r["accuracy"] for r in runs.values()) for name, runs in results.items()}
    order = sorted(means, key=lambda name: -means[name])
    rows = []
    for name in order:
        runs = list(results[name].values())
        percent = [100 * r["accuracy"] for r in runs]
        spread = f"{min(percent):.1f} to {max(percent):.1f}"
        rows.append([name, f"{runs[0]['parameters']:,}", f"{statistics.mean(percent):.1f}%", spread])
    print(_measure.table(["method", "parameters", "test accuracy", "lowest to highest seed"], rows))

    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(order) + 1.2), layout="constrained")
    for k, name in enumerate(reversed(order)):
        percent = [100 * r["accuracy"] for r in results[name].values()]
        axes.plot(percent, [k] * len(percent), "o", color="tab:grey" if name == FROZEN else "tab:blue", markersize=4)
        axes.plot([100 * means[name]], [k], "|", color="black", markersize=12)
    axes.set_yticks(range(len(order)), list(reversed(order)), fontsize=8)
    axes.set(xlabel="accuracy on 1,500 test sentences (%)", title="MiniLM-L6 on film reviews, one epoch")
    axes.grid(True, axis="x", alpha=0.25)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def main() -> None:
    """Reads the options, trains what is missing, prints and writes."""
    parser = _measure.parser(__doc__, "quality.json")
    names = [FROZEN, *METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, metavar="METHOD", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=int, default=93, help="of 32 sentences (default: 93, one epoch)")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {"steps": options.steps, "methods": {}}
    if result["steps"] != options.steps:
        parser.error(f"{options.out} holds runs of {result['steps']} steps: give another --out")
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())  # seeds share their compiled programs
    done = {(name, int(seed)) for name, runs in result["methods"].items() for seed in runs}
    missing = [(name, seed) for seed in options.seeds for name in options.methods if (name, seed) not in done]
    make_task = functools.cache(Task)  # made by the first run: it downloads and encodes
    for name, seed in tqdm(missing, "runs", disable=not missing):
        result["methods"].setdefault(name, {})[str(seed)] = make_task().run(name, seed, options.steps)
        result["environment"] = _measure.environment()  # of the last run
        _measure.save(options.out, result)
    show({name: runs for name, runs in result["methods"].items() if runs}, options.out)


if __name__ == "__main__":
    main()
