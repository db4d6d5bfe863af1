"""Fine-tunes SmolLM2-135M-Instruct with LoRA to write like film critics; shows replies before and after.

python examples/finetune_smollm.py                  # about a quarter of an hour on two cores
python examples/finetune_smollm.py --steps 400 --rank 16

Writes a report, samples, the adapter, and the adapter in PEFT's format for transformers and serving engines.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer
from tqdm import tqdm

import assets
import critic
import jlora
import report
import reviews
import smollm

TARGETS = r"layers/(attention|mlp)/\w+/kernel"
BATCH, HELD_OUT = 8, 200
SAMPLES, COUNT, TEMPERATURE = 4, 40, 0.7


def arguments() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of adapter, data order and samples (default: 0)")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA factors; the scale is always 2 (default: 8)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    parser.add_argument("--results", type=Path, help="a JSON file of many runs, into which this one is also written")
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH} sentences (default: 150)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/smollm"), metavar="FOLDER", help="must not exist (default: runs/smollm)"
    )
    options = parser.parse_args()
    if options.rank < 1 or options.steps < 1:
        parser.error("--rank and --steps must be positive integers")
    if options.out.exists():  # trained adapters are never overwritten
        parser.error(f"{options.out} exists: remove it, or choose another --out")
    return options


def loss(forward: smollm.Forward) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(params, ids, written) -> the sum of -log p in nats over the tokens to be learned, and their number."""

    def total(params: Any, ids: jax.Array, written: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = forward(params, ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return (losses * written[:, 1:]).sum(), written[:, 1:].sum()

    return total


def perplexity(total: Any, params: Any, replies: critic.Replies) -> float:
    """exp of the mean of -log p over all tokens to be learned; `total` is jitted."""
    parts = [total(params, *(x[start : start + 20] for x in replies)) for start in range(0, len(replies.ids), 20)]
    nats, tokens = (sum(float(part[k]) for part in parts) for k in (0, 1))
    return float(np.exp(nats / tokens))


def train(apply: Any, adapter: Any, params: Any, replies: critic.Replies, options: Any) -> tuple[Any, list[float]]:
    """Trains the adapter with AdamW, warm-up and cosine decay; returns it and the loss of every step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.lr, max(1, options.steps // 10), max(2, options.steps))
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def mean(adapter: Any, params: Any, ids: jax.Array, written: jax.Array) -> jax.Array:
        nats, tokens = loss(lambda params, *args: apply(params, adapter, *args))(params, ids, written)
        return nats / tokens

    @jax.jit
    def step(adapter: Any, state: Any, params: Any, ids: Any, written: Any) -> tuple[Any, Any, jax.Array]:
        value, gradients = jax.value_and_grad(mean)(adapter, params, ids, written)
        updates, state = optimiser.update(gradients, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    state = optimiser.init(adapter)
    losses: list[float] = []
    batches = critic.batches(replies, BATCH, np.random.default_rng(options.seed))
    interval = 0.2 if sys.stderr.isatty() else 20.0
    with tqdm(total=options.steps, desc="LoRA", unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for batch in itertools.islice(batches, options.steps):
            adapter, state, value = step(adapter, state, params, *batch)
            losses.append(float(value))
            bar.set_postfix_str(f"loss {np.mean(losses[-10:]):.3f}", refresh=False)
            bar.update()
    return adapter, losses


class Writer:
    """Generates replies; parameters of one structure share one compiled program."""

    def __init__(self, forward: smollm.Forward, config: smollm.Config, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

        def run(params: Any, prompts: jax.Array, key: jax.Array) -> jax.Array:
            return smollm.generate(forward, params, prompts, config, COUNT, temperature=TEMPERATURE, key=key)

        self.run = jax.jit(run)

    def samples(self, params: Any, liked: bool, seed: int) -> list[str]:
        """Several replies to one prompt."""
        tokens = self.run(params, self.prompts(liked), jax.random.key(seed))
        return [self.text(reply) for reply in np.asarray(tokens).tolist()]

    def prompts(self, liked: bool) -> jax.Array:
        """The tokens of a batch of equal prompts."""
        return jnp.asarray([self.tokenizer.encode(critic.prompt(liked)).ids] * SAMPLES)

    def text(self, tokens: list[int]) -> str:
        """The reply up to its end token; an ellipsis marks a reply that was truncated."""
        end = self.tokenizer.token_to_id(smollm.END)
        text = self.tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
        return " ".join(text.split()) + ("" if end in tokens else " …")


def speeds(runs: dict[str, tuple[Writer, Any]], rounds: int = 5) -> dict[str, float]:
    """Tokens a second of each: medians over rounds in which they run in turns."""
    key = jax.random.key(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for count in range(rounds + 1):
        for name, (writer, params) in runs.items():
            prompts = writer.prompts(True)
            started = time.perf_counter()
            jax.block_until_ready(writer.run(params, prompts, key))
            if count:  # the first round compiles
                seconds[name].append(time.perf_counter() - started)
    return {name: SAMPLES * COUNT / statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    options = arguments()
    try:
        file, sentences = assets.smollm(), assets.reviews()
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    started = time.perf_counter()
    model, tokenizer = smollm.load(file)
    graph, params = nnx.split(model)
    forward = smollm.forward(graph)
    texts, labels = reviews.read(sentences)
    order = np.random.default_rng(0).permutation(len(texts))
    held_out, rest = (
        critic.encode(tokenizer, [texts[i] for i in part], labels[part]) for part in np.split(order, [HELD_OUT])
    )

    # 1. The model before training.
    total = jax.jit(loss(forward))
    writer = Writer(forward, model.config, tokenizer)
    samples = {"before": {liked: writer.samples(params, liked, options.seed) for liked in (True, False)}}
    measured = {"before": perplexity(total, params, held_out)}
    print(f"before: perplexity {measured['before']:.1f} on {len(held_out.ids)} held-out sentences", flush=True)

    # 2. LoRA on every kernel of attention and MLP.
    sites = jlora.trace(forward, params, rest.ids[:1])
    method = jlora.LoRA(rank=options.rank, alpha=2 * options.rank)
    adapter = jlora.init(jax.random.key(options.seed), sites, {TARGETS: method})
    adapted = jlora.adapt(forward)
    adapter, losses = train(adapted, adapter, params, rest, options)

    # 3. Save, load and evaluate what was saved; the exported PEFT files must hold the same adapter.
    options.out.mkdir(parents=True)
    jlora.save(options.out / "adapter", adapter, params=params)
    adapter = jlora.load(options.out / "adapter", params=params)
    maps = jlora.peft.names.LLAMA_TIED
    jlora.peft.save(options.out / "peft", adapter, maps)
    exported = jlora.peft.load(options.out / "peft", sites, maps)
    if not jax.tree.all(jax.tree.map(np.array_equal, adapter, exported)):
        raise RuntimeError(f"The adapter read from {options.out / 'peft'} differs from the one written to it.")

    # 4. The adapter merged into plain parameters, in the unmodified model.
    merged = jlora.merge(params, adapter)
    samples["after"] = {liked: writer.samples(merged, liked, options.seed) for liked in (True, False)}
    measured["after"] = perplexity(total, merged, held_out)
    unmerged = Writer(lambda pair, *args: adapted(*pair, *args), model.config, tokenizer)
    tokens_per_second = speeds(
        {"base": (writer, params), "merged": (writer, merged), "not merged": (unmerged, (params, adapter))}
    )

    result = {
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "results")}
        | {"batch": BATCH, "targets": TARGETS},
        "sentences": {"train": len(rest.ids), "held out": len(held_out.ids)},
        "parameters": {"base": report.size(params), "LoRA": report.size(adapter)},
        "bytes": {name: report.bytes_on_disk(options.out / name) for name in ("adapter", "peft")},
        "perplexity": measured,
        "tokens_per_second": tokens_per_second,
        "samples": {when: {"praise": texts[True], "pan": texts[False]} for when, texts in samples.items()},
        "losses": losses,
        "seconds": time.perf_counter() - started,
        "environment": report.environment(),
    }
    (options.out / "report.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if options.results:
        report.record(options.results, (str(options.seed),), result)
    text = markdown(result)
    draw(options.out / "curves.png", result)
    (options.out / "report.md").write_text(text + "\n\n![loss and perplexity](curves.png)\n")
    print(f"\n{text}\n\nWritten to {options.out}: report.md, report.json, curves.png, adapter, peft")
    return 0


def markdown(result: dict[str, Any]) -> str:
    """The report."""
    settings, sizes, sentences = result["settings"], result["parameters"], result["sentences"]
    speed, measured = result["tokens_per_second"], result["perplexity"]
    lines = [
        "# SmolLM2-135M-Instruct as a film critic",
        "",
        "| | before | after |",
        "| --- | --: | --: |",
        f"| perplexity of held-out sentences | {measured['before']:.1f} | {measured['after']:.1f} |",
        "",
        f"- {sizes['LoRA']:,} numbers trained, {sizes['LoRA'] / sizes['base']:.2%} of the model's {sizes['base']:,}; "
        f"rank {settings['rank']}, {settings['steps']} steps of {settings['batch']} sentences out of "
        f"{sentences['train']:,}, {sentences['held out']} held out, seed {settings['seed']}",
        f"- tokens a second, {SAMPLES} replies at a time: base {speed['base']:.0f}, merged {speed['merged']:.0f}, "
        f"not merged {speed['not merged']:.0f}",
        f"- the adapter takes {result['bytes']['adapter']:,} bytes, in PEFT's format {result['bytes']['peft']:,}",
        f"- {result['seconds']:.0f} s in all, compilation included",
    ]
    for request in ("praise", "pan"):
        lines += ["", f"## Asked to {request}"]
        for when in ("before", "after"):
            lines += ["", f"{when.capitalize()}:", ""] + [f"> {text}\n" for text in result["samples"][when][request]]
    return "\n".join(lines)


def draw(path: Path, result: dict[str, Any]) -> None:
    """Draws the training loss, and the perplexity before and after training."""
    plt = report.plt
    with plt.rc_context(report.STYLE):
        figure, (curve, bars) = plt.subplots(
            1, 2, figsize=(9, 3.6), dpi=150, layout="constrained", width_ratios=[2.2, 1]
        )
        losses = result["losses"]
        steps = np.arange(1, len(losses) + 1)
        curve.plot(steps, losses, color=report.COLOURS["LoRA"], alpha=0.25, linewidth=0.8)
        curve.plot(steps, report.smooth(losses), color=report.COLOURS["LoRA"], linewidth=2)
        curve.set(title="Training loss (thick: running mean)", xlabel="step", ylabel="nats a token")
        values = result["perplexity"]
        colours = [report.COLOURS["head alone"], report.COLOURS["LoRA"]]
        rectangles = bars.bar(list(values), list(values.values()), 0.6, color=colours)
        bars.bar_label(rectangles, fmt="%.1f", padding=2, fontweight="bold")
        bars.set(title="Held-out sentences", ylabel="perplexity")
        bars.margins(y=0.12)
        bars.grid(visible=False, axis="x")
        figure.savefig(path)
        plt.close(figure)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
