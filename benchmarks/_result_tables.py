"""Tables of the benchmarks' own pages, from their result files."""

import functools
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import _measure

_SOURCES = {"disk": "disk", "cache": "cache"}
_STEPS = {
    "jlora": "jlora",
    "by hand, flattened": "by hand, activations flattened",
    "by hand": "by hand",
    "merge in the step": "merge in the step",
    "full fine-tuning": "full fine-tuning",
}
_MODELS = {
    "unrolled": "unrolled",
    "unrolled_biased": "unrolled, biases",
    "unrolled_swiglu": "unrolled, SwiGLU",
    "scanned": "scanned",
    "scanned_biased": "scanned, biases",
    "scanned_swiglu": "scanned, SwiGLU",
}


@functools.cache
def result(name: str) -> dict[str, Any]:
    """A result file, by its name without `.json`."""
    return json.loads((_measure.RESULTS / f"{name}.json").read_text())


def steps() -> str:
    """A training step of the small transformer in every form."""
    body = []
    for form, prefix in (("unrolled", ""), ("scanned", "scanned: ")):
        rows = result("step")[form]["steps"]
        for key, label in _STEPS.items():
            row = rows[key]
            sizes = [f"{row['flops'] / 1e9:.2f}", f"{row['temp_bytes'] / 1e6:.1f}"]
            times = [_measure.number(row[name]) for name in ("seconds", "of_full", "lower_seconds")]
            body.append([prefix + label, *sizes, *times, _spread(row["rounds"])])
    header = ["step", "GFLOPs", "temporary MB", "seconds", "of full", "lowering s", "lowest to highest s"]
    return _measure.table(header, body)


def compiled_steps() -> str:
    """A step of every form of the transformer: jlora, and both programs by hand."""
    body = []
    for form, label in _MODELS.items():
        rows = result("step")[form]["steps"]
        memory = [f"{rows[name]['temp_bytes'] / 1e6:.1f}" for name in ("jlora", "by hand, flattened", "by hand")]
        seconds = {name: rows[name]["rounds"] for name in ("jlora", "by hand, flattened", "by hand")}
        times = [f"{_measure.ratio(seconds, 'jlora', name):.3f}" for name in ("by hand, flattened", "by hand")]
        body.append([label, f"{rows['jlora']['flops'] / 1e9:.2f}", *memory, *times])
    header = ["model", "GFLOPs", "temporary MB", "by hand, flattened", "by hand", "time / flattened", "time / by hand"]
    return _measure.table(header, body)


def _spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def quality() -> str:
    """What every method learns, the best first."""
    methods: Mapping[str, Any] = result("quality")["methods"]
    percent = {name: [100 * run["accuracy"] for run in runs.values()] for name, runs in methods.items()}
    body = []
    for name in sorted(percent, key=lambda name: -statistics.mean(percent[name])):
        parameters = next(iter(methods[name].values()))["parameters"]
        spread = f"{min(percent[name]):.1f} to {max(percent[name]):.1f}"
        seeds = len(percent[name])
        body.append([name, f"{parameters:,}", f"{statistics.mean(percent[name]):.1f}%", spread, seeds])
    return _measure.table(["method", "trained parameters", "test accuracy, mean", "lowest to highest", "seeds"], body)


def loading() -> str:
    """Loading an adapter of 1 GiB, beside Orbax."""
    body = []
    for form in ("stacked", "unrolled"):
        row = result("io")[form]
        name = f"{row['arrays']:,} arrays of {row['bytes'] // row['arrays'] // 2**20} MiB"
        memory = [f"{row['peak_bytes'][reader] / row['bytes']:.3f}" for reader in ("jlora", "orbax")]
        for source in _SOURCES:
            seconds = [f"{row['median_seconds'][source][reader]:.2f}" for reader in ("jlora", "orbax")]
            ratio = _measure.ratio(row["rounds"][source], "jlora", "orbax")
            body.append([name, source, *seconds, f"{ratio:.2f}", *memory])
    header = ["adapter", "from", "jlora, s", "Orbax, s", "median ratio", "memory / size", "of Orbax"]
    return _measure.table(header, body)


def experts() -> str:
    """The mixture of experts, adapted by three methods."""
    labels = {"lora": "LoRA", "dora": "DoRA", "shared": "LoRA, outer factors shared"}
    base, methods = result("train_experts")["base"], result("train_experts")["methods"]
    body = [["nothing", f"{base['accuracy']:.1%}", "", "", ""]]
    for key, row in methods.items():
        files = row["files"]
        together, each = files["PEFT, target_parameters"], files["PEFT, a module for each expert"]
        loaded = "exact" if not each["loaded"] else f"within {each['loaded']:.0e}".replace("e-0", "e-")
        cell = f"{together.get('tensors', 'refused')} / {each['tensors']}, {loaded} when loaded"
        figures = [f"{row['accuracy']:.1%}", f"{row['trained numbers']:,}", f"{row['added FLOPs']:.1%}"]
        body.append([labels[key], *figures, cell])
    header = ["adapted by", "accuracy, 500 sentences", "trained numbers", "added FLOPs"]
    return _measure.table([*header, "tensors in PEFT's file: parameters / a module for each expert"], body)


def quantised() -> str:
    """Bytes of a training step on 4-bit blocks and on bfloat16 weights."""
    rows = result("quantized")["rows"]
    body = [[name, *(f"{n / 1e6:.1f}" for n in (*row.values(), sum(row.values())))] for name, row in rows.items()]
    return _measure.table(["base", "arguments, MB", "temporaries, MB", "both, MB"], body)


def many() -> str:
    """A bank of 16 adapters against one adapter on the same tokens, as compiled."""
    rows = result("many")["rows"]
    names = {
        "unrolled, gradient": ("unrolled", "gradient", "1.01, 1.05"),
        "unrolled, forward": ("unrolled", "forward", "1.01, 1.05"),
        "scanned with remat, gradient": ("scanned", "gradient", "1.01, 1.20"),
        "scanned with remat, forward": ("scanned", "forward", "1.01, 1.20"),
    }
    body = []
    for label, (form, what, bars) in names.items():
        both = [rows[f"{form}, ranks {ranks}, {what}"] for ranks in ("8", "2/4/8")]
        body.append([label, *(f"{max(row[key] for row in both):.3f}" for key in ("flops", "temporaries")), bars])
    decoding = rows["decoding"]
    ratio = decoding["temporaries"] / decoding["one"]
    limit = f"{1.05 + decoding['gathered'] / decoding['one']:.2f}"
    body.append(["a step of decoding, 32 rows", f"{decoding['flops']:.3f}", f"{ratio:.3f}", f"1.01, {limit}"])
    return _measure.table(["program", "FLOPs", "temporary bytes", "bars"], body)


def many_times() -> str:
    """Wall times of many adapters."""
    rows = result("many")["rows"]
    serving, five = rows["serving"], rows["serving"]["5 adapters"]["tokens/s"]
    many_of, alone = (serving[name]["tokens/s"] for name in ("2,000 adapters", "one adapter, no bank"))
    by_name = {bar["name"]: bar["value"] for bar in result("many")["bars"]}
    of_thousands = 1 / next(value for name, value in by_name.items() if "2,000 adapters / 5" in name)
    of_mixed = 1 / next(value for name, value in by_name.items() if "mixed rows" in name)
    assert many_of
    assert alone
    swap = serving["swap"]
    body = [
        [
            "eight small jobs as one program (4 layers, 16 tokens each), against one after another",
            f"{rows['jobs']['speed-up']:.2f} times faster",
            "bar 1.46",
        ],
        [
            "SmolLM2-135M with a cache, 32 rows: tokens a second for 5 adapters in a pool of 64 slots",
            f"{five:.0f}",
            "",
        ],
        [
            "the same for 2,000 adapters, requests distributed by Zipf's law (1.3)",
            f"{of_thousands:.2f} of that rate",
            "bar 0.945",
        ],
        [
            "rows of different adapters against one adapter without a bank",
            f"{of_mixed:.2f} of the rate",
            "bar 0.9",
        ],
        [
            "a swap: an adapter of 1.8 MB from the host into a slot",
            f"{swap['milliseconds']:.2f} ms",
            f"a compilation: {swap['compilation in seconds']:.2f} s",
        ],
        ["bytes of the pool", f"{serving['pool']['bytes'] / 1e6:.0f} MB", "as computed"],
    ]
    return _measure.table(["wall time, in turns, beside other work (about half of the machine)", "", ""], body)


def server() -> str:
    """A server of a small language model."""
    body = []
    for name, row in result("serve_many")["servers"].items():
        first = ", ".join(f"{row[f'first token p{p}']:.2f}" for p in (50, 95))
        swaps = f"{row['swaps per request']:.2f}" if row["swaps per request"] else "0"
        body.append([name, f"{row['tokens/s']:.0f}", first, swaps])
    header = ["adapters in the pool of 64 slots", "tokens/s", "first token, s: p50, p95", "swaps per request"]
    return _measure.table(header, body)


def genres() -> str:
    """Four genres as one program: means over seeds, the same in all three ways."""
    data = result("train_many")
    frozen, runs = data["frozen encoder"], list(data["runs"].values())
    body = []
    for genre in frozen:
        cells = []
        for way in ("alone", "together", "mixed batch"):
            percent = [100 * run["genres"][genre][way]["accuracy"] for run in runs]
            cells.append(f"{statistics.mean(percent):.1f}% ({min(percent):.1f} to {max(percent):.1f})")
        body.append([genre, f"{frozen[genre]:.1%}", *cells])
    return _measure.table(["genre", "frozen encoder", "alone", "together", "mixed batch"], body)


def rates() -> str:
    """Ranks and learning rates."""
    folder = str(Path(__file__).parents[1] / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    import sweep_report  # an example's module, which has no package

    return sweep_report.table(result("sweep")["runs"])


def files() -> str:
    """What each result file says of the machine that wrote it."""
    body = []
    for file in sorted(_measure.RESULTS.glob("*.json")):
        data = result(file.stem)
        machine = data.get("environment", {})
        versions = [f"{word}{data[key]}" for key, word in {"jax": "", "peft": "PEFT "}.items() if key in data]
        if file.stem == "plan":
            rows = [plan.get("versions", {}).get("jax") for plans in data.values() for plan in plans.values()]
            versions = [f"{sum(map(bool, rows))} of {len(rows)} programs state theirs"]
        if not machine:
            body.append([f"`{file.name}`", ", ".join(versions), "not recorded", "", ""])
            continue
        device, load = f"{machine['device']}, {machine['cores']} cores", f"{machine['load']:.0f}"
        body.append([f"`{file.name}`", machine["jax"], device, machine["python"], load])
    return _measure.table(["file", "JAX", "machine", "Python", "load"], body)
