"""Tables of runs that train a real model, from their result files."""

import statistics
from typing import Any

from benchmarks import _measure
from benchmarks._result_tables import result


def _reviews(base: str) -> dict[str, dict[str, Any]]:
    """The runs of `finetune_reviews.py` on a base, by seed."""
    return result("finetune_reviews")["runs"][base]


def _percent(runs: dict[str, dict[str, Any]], name: str) -> list[float]:
    return [100 * run["accuracy"][name] for run in runs.values()]


def reviews() -> str:
    """An encoder on film reviews: every seed, and the mean with the spread."""
    runs = _reviews("float32")
    body = [
        [
            seed,
            f"{run['accuracy']['head alone']:.1%}",
            f"{run['accuracy']['LoRA']:.1%}",
            f"{run['merged']['max_abs_difference']:.1e}",
        ]
        for seed, run in runs.items()
    ]
    means = [
        f"{statistics.mean(values):.1f}% ({max(values) - min(values):.1f})"
        for values in (_percent(runs, "head alone"), _percent(runs, "LoRA"))
    ]
    header = ["seed", "head alone", "LoRA", "adapted against merged logits"]
    return _measure.table(header, [*body, ["mean (spread)", *means, ""]])


def reviews_sizes() -> tuple[str, ...]:
    """Numbers of the LoRA and its share, bytes of adapter and encoder, and the seconds of a run."""
    runs = list(_reviews("float32").values())
    sizes, stored, seconds = runs[0]["parameters"], runs[0]["bytes"], [run["seconds"] for run in runs]
    share = f"{sizes['LoRA'] / sizes['base']:.2%}"
    megabytes = f"{stored['adapter'] / 1e6:.1f}", f"{stored['base'] / 1e6:.0f}"
    return f"{sizes['LoRA']:,}", share, *megabytes, f"{min(seconds):.0f}", f"{max(seconds):.0f}"


def reviews_encoder() -> tuple[str, ...]:
    """The number of parameters of the encoder."""
    return (f"{next(iter(_reviews('float32').values()))['parameters']['base'] / 1e6:.1f}M",)


def reviews_means() -> tuple[str, ...]:
    """Mean accuracies of LoRA and of a head alone."""
    runs = _reviews("float32")
    return tuple(f"{statistics.mean(_percent(runs, name)):.1f}%" for name in ("LoRA", "head alone"))


def reviews_bases() -> str:
    """The same on quantised bases."""
    bases = {"float32": _reviews("float32")} | result("finetune_reviews_quantised")["runs"]
    seeds = list(bases["float32"])
    body = [[base, *(f"{runs[seed]['accuracy']['LoRA']:.1%}" for seed in seeds)] for base, runs in bases.items()]
    return _measure.table(["base", *(f"seed {seed}" for seed in seeds)], body)


def _smollm() -> dict[str, Any]:
    return result("finetune_smollm")["runs"]["0"]


def perplexity() -> str:
    """A language model before and after training."""
    run = _smollm()
    requests = {"praise": "Praise a film in one sentence.", "pan": "Pan a film in one sentence."}
    body = [
        [
            f"perplexity of {run['sentences']['held out']} held-out sentences",
            *(f"{run['perplexity'][when]:.1f}" for when in ("before", "after")),
        ]
    ]
    for key, request in requests.items():
        texts = [run["samples"][when][key] for when in ("before", "after")]
        first = [texts_of[0] if isinstance(texts_of, list) else texts_of for texts_of in texts]
        body.append([f'"{request}"', *(" ".join(text.split()) for text in first)])
    return _measure.table(["", "before", "after"], body)


def writing_parameters() -> tuple[str, ...]:
    """The trained share of the language model's numbers."""
    numbers = _smollm()["parameters"]
    return (f"{numbers['LoRA'] / numbers['base']:.1%}",)


def writing_speed() -> tuple[str, ...]:
    """Tokens a second of the merged model and of the base."""
    speed = _smollm()["tokens_per_second"]
    return f"{speed['merged']:.0f}", f"{speed['base']:.0f}"


def evolution() -> tuple[str, ...]:
    """The share of correct points before and after evolution, and the number of generations."""
    run = result("evolution")
    first, last = (f"{run['accuracies'][k]:.1%}" for k in (0, -1))
    return first, last, str(run["settings"]["generations"])


def evolution_cost() -> tuple[str, ...]:
    """FLOPs of all members, of the base's on as many points."""
    return (f"{result('evolution')['FLOPs / base']:.3f}",)
