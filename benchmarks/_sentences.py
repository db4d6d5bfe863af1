"""Sentences of pages with figures from result files: the text with `{}` for each figure, and what computes them."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import _plan_report, _training_tables
from benchmarks._plan_rows import SMALLEST, slice_name
from benchmarks._result_tables import result

ROOT = Path(__file__).parents[1]
_FIGURE = r"[-+]?\d+(?:[.,]\d+)*(?:e-?\d+)?[%M]?"


class Sentence(NamedTuple):
    """A part of one line of a page.

    Arguments:
        page: the file, from the root of the repository.
        text: the words, with `{}` in the place of each figure.
        figures: gives the figures in order, as they are printed.
    """

    page: str
    text: str
    figures: Callable[[], tuple[str, ...]]


def with_sentence(text: str, sentence: Sentence) -> str:
    """The text of a page with a sentence's present figures.

    Raises:
        ValueError: if the page does not have the sentence exactly once.
    """
    # No digit may follow: else the pattern would end within a figure.
    pattern = _FIGURE.join(re.escape(words) for words in sentence.text.split("{}")) + r"(?!\d)"
    out, count = re.subn(pattern, lambda _: sentence.text.format(*sentence.figures()), text)
    if count != 1:
        raise ValueError(f"{sentence.page} has {count} times, not once: {sentence.text!r}. Change SENTENCES, too.")
    return out


def _plans() -> _plan_report.Results:
    return result("plan")


def _smallest_slices() -> list[_plan_report.Plans]:
    return [
        _plans()[slice_name(*key, f"{generation}:{smallest}")]
        for key, slices in SMALLEST.items()
        for generation, (_, smallest) in slices.items()
    ]


def _slices() -> tuple[str, ...]:
    rows = _smallest_slices()
    ratios = [row["jlora"]["temporary_bytes"] / row["by hand"]["temporary_bytes"] for row in rows]
    refused = sum(not row["merged"]["fits"] for row in rows)
    return f"{min(ratios):.2f}", f"{max(ratios):.2f}", str(refused), str(len(rows))


def _weak_scaling() -> tuple[str, ...]:
    flops, temporaries = _plan_report.weak_scaling_bars(_plans())
    return f"{flops.value - 1:.1%}", f"{temporaries.value - 1:.1%}"


def _gpt3() -> tuple[str, ...]:
    trained = _plans()["GPT-3 v5p:4x4x4"]["jlora"]["trained"]
    return f"{trained / 1e6:.1f}M", f"{2 * trained / 1e6:.1f}", f"{4 * trained / 1e6:.1f}"


def _experts() -> tuple[str, ...]:
    methods = result("train_experts")["methods"].values()
    moved = [share for row in methods for layer in row["moved"] for share in layer]
    sizes = [share for share in moved if share > 1e-6]
    experts = [share for layer in next(iter(methods))["moved"] for share in layer]
    largest = max(max(row["merged"], row["other dispatch"]) for row in methods)
    still = sum(share <= 1e-6 for share in experts)
    exponent = f"{largest:.0e}".replace("e-0", "e-")
    return str(len(experts) - still), str(len(experts)), f"{min(sizes):.0%}", f"{max(sizes):.0%}", str(still), exponent


def _experts_base() -> tuple[str, ...]:
    return (f"{result('train_experts')['base']['numbers'] / 1e6:.1f}M",)


def _standard_error(accuracy: float, count: int) -> str:
    return f"{100 * (accuracy * (1 - accuracy) / count) ** 0.5:.1f}"


def _experts_error() -> tuple[str, ...]:
    accuracies = [row["accuracy"] for row in result("train_experts")["methods"].values()]
    return (_standard_error(statistics.mean(accuracies), 500),)


def _quantised() -> tuple[str, ...]:
    quantised, bfloat16 = (sum(row.values()) for row in result("quantized")["rows"].values())
    return (f"{quantised / bfloat16:.2f}",)


def _decoding() -> tuple[str, ...]:
    row = result("many")["rows"]["decoding"]
    limit = 1.05 + row["gathered"] / row["one"]
    return f"{row['one'] / 1e6:.1f}", f"{row['gathered'] / 1e6:.1f}", f"{limit:.2f}"


def _decoding_more() -> tuple[str, ...]:
    row = result("many")["rows"]["decoding"]
    return (f"{(row['temporaries'] - row['one']) / 1e6:.1f}",)


def _pool() -> tuple[str, ...]:
    rates = {name: row["tokens/s"] for name, row in result("serve_many")["servers"].items()}
    alone = rates.pop("one, without a bank")
    lost = [1 - rate / alone for rate in rates.values()]
    swap = result("serve_many")["swap"]
    return f"{100 * min(lost):.0f}", f"{max(lost):.0%}", f"{1e3 * swap['slot']:.1f}", f"{1e3 * swap['merge']:.0f}"


def _genres() -> tuple[str, ...]:
    data = result("train_many")
    ways = [way for run in data["runs"].values() for genre in run["genres"].values() for way in genre.values()]
    error = _standard_error(statistics.mean(way["accuracy"] for way in ways), data["test texts"])
    assert all(way["same class"] == 1 for way in ways)
    largest = f"{max(way['difference of logits'] for way in ways):.1e}".replace("e-0", "e-")
    return str(data["test texts"]), error, largest


def _losses() -> dict[tuple[int | None, str, int], tuple[float, dict[int, float]]]:
    """For each setting of the sweep the mean loss at the best rate, and the losses of its seeds there."""
    cells: dict[tuple[int | None, str, int], dict[float, dict[int, float]]] = {}
    for run in result("sweep")["runs"]:
        cell = cells.setdefault((run["rank"], run["layers"], run["batch"]), {})
        cell.setdefault(run["rate"], {})[run["seed"]] = run["loss"]
    best = {key: min(cell.values(), key=lambda s: statistics.mean(s.values())) for key, cell in cells.items()}
    return {key: (statistics.mean(seeds.values()), seeds) for key, seeds in best.items()}


def _frozen() -> tuple[str, ...]:
    return (f"{result('sweep')['frozen_loss']:.3f}",)


def _low_rates() -> tuple[str, ...]:
    def loss(layers: str, rank: int) -> str:
        runs = result("sweep")["runs"]
        same = [r["loss"] for r in runs if (r["rank"], r["layers"], r["batch"], r["rate"]) == (rank, layers, 8, 1e-4)]
        return f"{statistics.mean(same):.3f}"

    return loss("all", 20), loss("MLP", 36), loss("attention", 45)


def _large_batches() -> tuple[str, ...]:
    losses = _losses()

    def over_full(batch: int) -> list[float]:
        (_, rank), (_, full) = losses[20, "all", batch], losses[None, "all", batch]
        return [rank[seed] - full[seed] for seed in rank]

    large, small = over_full(64), over_full(8)
    others = sorted(large)[:-1]
    return tuple(f"{statistics.mean(values):+.3f}" for values in (large, small, others))


def _ranks() -> tuple[str, ...]:
    losses = _losses()
    ranks = [losses[rank, "all", 8][0] for rank in (1, 4, 20, 128, None)]
    return tuple(f"{loss:.3f}" for loss in ranks)


def _attention() -> tuple[str, ...]:
    losses = _losses()
    return f"{losses[20, 'all', 8][0]:.3f}", f"{losses[45, 'attention', 8][0]:.3f}"


def _dora() -> tuple[str, ...]:
    return (f"{result('methods')['transformer']['methods']['DoRA']['temp_bytes'] - 1:.0%}",)


def _less_memory() -> tuple[str, ...]:
    methods = result("methods")["transformer"]["methods"]
    return (f"{1 - max(methods[name]['temp_bytes'] for name in ('LoRA-FA', 'MiSS')):.0%}",)


def _gains_of_sites() -> tuple[str, ...]:
    sites = result("methods")["site"]["methods"]
    return (f"{max(row['activations'] for name, row in sites.items() if name.startswith('GLoRA')):.1f}",)


def _frozen_encoder() -> tuple[str, ...]:
    runs = result("quality")["methods"]["frozen encoder"].values()
    return (f"{statistics.mean(run['accuracy'] for run in runs):.1%}",)


def _offset() -> tuple[str, ...]:
    return (f"{result('methods')['transformer']['methods']['LoRA, offset']['flops'] - 1:.0%}",)


def _io_load() -> tuple[str, ...]:
    return (f"{result('io')['environment']['load']:.0f}",)


def _nf4_bits() -> tuple[str, ...]:
    return (f"{result('merging')['rows']['NF4']['bits of a weight']:.2f}",)


def _loss_before() -> tuple[str, ...]:
    return (f"{result('merging')['rows']['NF4']['before']:.1f}",)


_README, _MANY, _TPUS = "benchmarks/README.md", "benchmarks/many.md", "benchmarks/tpus.md"
_METHODS, _IO = "jlora/methods/README.md", "jlora/io/README.md"

SENTENCES = (
    Sentence(_TPUS, "Temporaries are {} to {} of those of the same LoRA written into the model. "
             "With the LoRA merged inside the step, {} of these {} steps do not fit.", _slices),
    Sentence(_TPUS, "FLOPs a chip change by {} and temporary bytes by {}.", _weak_scaling),
    Sentence(_TPUS, "The {} numbers of the adapter take {} MB in 16 bits (the paper: 35 MB), and {} MB in float32",
             _gpt3),
    Sentence(_README, "The machine was busy with other work (a load of {} on its two cores)", _io_load),
    Sentence(_README, "trains a base of {} numbers", _experts_base),
    Sentence(_README, "{} of {} move by {} to {}, and the {} closed ones not at all. "
             "Merged logits and those of the dense dispatch are within {}.", _experts),
    Sentence(_README, "The standard error of an accuracy is {} points.", _experts_error),
    Sentence(_README, "The step on 4-bit blocks takes {} of the memory.", _quantised),
    Sentence(_MANY, "may use 1.05 of one adapter's bytes ({} MB) and the factors of all rows ({} MB), {} in all.",
             _decoding),
    Sentence(_MANY, "it needs {} MB more than one adapter.", _decoding_more),
    Sentence(_MANY, "The pool costs {} to {} of the rate here, whatever the number of adapters. "
             "A swap takes {} ms into a slot, and {} ms by merging.", _pool),
    Sentence(_MANY, "the standard error on {} test sentences is {}. "
             "All three ways put every sentence into the same class (logits within {}).", _genres),
    Sentence(_MANY, "the frozen encoder's is {}.", _frozen),
    Sentence(_MANY, "(at 1e-4: all {}, MLP {}, attention {})", _low_rates),
    Sentence(_MANY, "{} against {}, is that of one seed; the mean of the other four is {}.", _large_batches),
    Sentence(_METHODS, "DoRA costs {} more memory", _dora),
    Sentence(_METHODS, "x A is all that the backward pass needs: {} less memory", _less_memory),
    Sentence(_METHODS, "Held-out loss falls with the rank: {}, {}, {} and {} for ranks 1, 4, 20 and 128, "
             "{} for full fine-tuning.", _ranks),
    Sentence(_METHODS, "beat attention alone at equal parameters ({} against {}, within the spread of the seeds)",
             _attention),
    Sentence(_METHODS, "All learn better than the frozen encoder with a head ({}).", _frozen_encoder),
    Sentence(_README, "NF4 (`jlora.quantize`) takes {} bits a weight", _nf4_bits),
    Sentence(_IO, "with its block scales in 8 bits ({} bits a weight)", _nf4_bits),
    Sentence(_IO, "before training the loss is {})", _loss_before),
    Sentence("jlora/_adapter/starts/README.md", "Such an adapter costs [{} more FLOPs]", _offset),
    Sentence(_README, "{} trained parameters ({} of the encoder); the saved adapter takes {} MB "
     "on disk, the encoder {} MB. A run took {} to {} s beside other work", _training_tables.reviews_sizes),
    Sentence("README.md", "{} of the test set correct, {} with a head alone",
     _training_tables.reviews_means),
    Sentence("README.md", "fine-tunes a real {}-parameter encoder",
     _training_tables.reviews_encoder),
    Sentence(_README, "an ordinary Linen encoder of {} parameters",
     _training_tables.reviews_encoder),
    Sentence("examples/README.md", "fine-tunes a {}-parameter encoder",
     _training_tables.reviews_encoder),
    Sentence(_README, "GLoRA misses it with {}", _gains_of_sites),
    Sentence(_README, "It trains LoRA (rank 8, {} of the weights)", _training_tables.writing_parameters),
    Sentence(_README, "The merged model writes {} tokens a second, the base {}.",
     _training_tables.writing_speed),
    Sentence(_MANY, "take {} of the FLOPs of the base on as many points", _training_tables.evolution_cost),
    Sentence(_MANY, "correct points rises from {} to {} in {} generations", _training_tables.evolution),
)  # fmt: skip
