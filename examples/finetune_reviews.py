"""Fine-tunes the MiniLM-L6 sentence encoder on film-review sentences with LoRA, and writes a report.

python examples/finetune_reviews.py                 # three epochs, a few minutes on two cores
python examples/finetune_reviews.py --full          # also runs full fine-tuning, for comparison
python examples/finetune_reviews.py --rank 2 --targets '.*/(query|value)/kernel'
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

import assets
import jlora
import minilm
import report
import reviews
from training import accuracy, apply_head, fit, fit_head, init_head, predict

TARGETS = r"params/layer_\d+/(attention|feed_forward)/\w+/kernel"
EPOCHS, BATCH = 3, 32


def arguments() -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of head, adapter and data order (default: 0)")
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA factors; the scale is always 2 (default: 8)")
    parser.add_argument(
        "--targets",
        default=TARGETS,
        metavar="REGEX",
        help="the weights to adapt, matched against full paths such as params/layer_0/attention/query/kernel "
        "(default: every kernel of attention and feed-forward)",
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate for LoRA (default: 2e-3)")
    parser.add_argument(
        "--base",
        choices=("float32", "int8", "nf4"),
        default="float32",
        help="format of the encoder's kernels (default: float32; int8 needs the package qwix)",
    )
    parser.add_argument("--steps", type=int, help=f"training steps of {BATCH} sentences (default: {EPOCHS} epochs)")
    parser.add_argument("--results", type=Path, help="a JSON file of many runs, into which this one is also written")
    parser.add_argument("--full", action="store_true", help="also run full fine-tuning, for comparison")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for report, curves, adapter, head and the merged model "
        "(default: the first unused of runs/reviews, runs/reviews-2, ...)",
    )
    options = parser.parse_args()
    if options.rank < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--rank and --steps must be positive integers")
    if options.full and options.base != "float32":
        parser.error("--full trains every weight, and quantised weights cannot be trained: leave out --base")
    options.out = options.out or unused("runs/reviews")
    if (options.out / "adapter").exists():  # trained adapters are never overwritten
        parser.error(f"{options.out / 'adapter'} exists: remove it, or choose another --out")
    return options


def unused(name: str) -> Path:
    """The folder `name`, or the first of `name-2`, `name-3`, ... that does not exist."""
    names = itertools.chain([name], (f"{name}-{k}" for k in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())


def main() -> int:
    options = arguments()
    try:
        folder, sentences = assets.minilm(), assets.reviews()
    except assets.AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    started = time.perf_counter()
    model, variables = minilm.load(folder)
    train, validation, test = reviews.load(sentences, folder / "tokenizer.json")
    steps = options.steps or EPOCHS * (len(train.labels) // BATCH)
    head_key, adapter_key = jax.random.split(jax.random.key(options.seed))
    head = init_head(head_key, model.width, classes=2)
    shared: dict[str, Any] = {"steps": steps, "batch": BATCH, "seed": options.seed}

    # Targets are checked first, so that a pattern that matches nothing fails at once.
    sites = jlora.trace(model.apply, variables, train.ids[:1], train.mask[:1])
    method = jlora.LoRA(rank=options.rank, alpha=2 * options.rank)
    try:
        adapter = jlora.init(adapter_key, sites, {options.targets: method})
    except (ValueError, re.error) as error:
        print(f"error: --targets: {error}", file=sys.stderr)
        return 2

    if options.base != "float32":
        float_variables, variables = variables, jlora.quantize(variables, sites, {TARGETS: options.base})
        if options.base == "nf4":  # LoRA starts with an approximation of the rounding error
            quantised = {path: update for path, update in adapter.items() if re.fullmatch(TARGETS, path)}
            variables, initialised = jlora.loftq(quantised, float_variables, variables)
            adapter |= initialised
    adapted = jlora.adapt(model.apply)

    # 1. The frozen encoder with a trained head, as the baseline.
    embed = jax.jit(lambda _, variables, ids, mask: adapted(variables, {}, ids, mask))
    frozen_head = fit_head(predict(embed, None, variables, train), train.labels, head)
    head_logits = np.asarray(apply_head(frozen_head, predict(embed, None, variables, test)))
    print(f"head alone: {accuracy(head_logits, test.labels):.1%} of {len(test.labels)} test sentences")

    # 2. LoRA and a head.
    def lora_logits(trainable: Any, variables: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return apply_head(trainable["head"], adapted(variables, trainable["adapter"], ids, mask))

    trainable = {"adapter": adapter, "head": head}
    trained, history = fit(
        lora_logits, trainable, variables, train, validation, name="LoRA", learning_rate=options.lr, **shared
    )

    # The adapter is saved and loaded again: what is evaluated is what was saved.
    options.out.mkdir(parents=True, exist_ok=True)
    jlora.save(options.out / "adapter", trained["adapter"])
    save_file({name: np.asarray(value) for name, value in trained["head"].items()}, options.out / "head.safetensors")
    trained = {"adapter": jlora.load(options.out / "adapter"), "head": trained["head"]}
    logits = predict(jax.jit(lora_logits), trained, variables, test)

    # 3. The adapter merged into plain parameters, in the unmodified model.
    def plain_logits(head: Any, variables: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return apply_head(head, model.apply(variables, ids, mask))

    merged = jlora.merge(variables, trained["adapter"])
    merged_logits = predict(jax.jit(plain_logits), trained["head"], merged, test)
    if options.base == "float32":  # and in the files of the checkpoint, for transformers and serving engines
        names = jlora.peft.infer_names(variables, folder)
        jlora.hf.save_merged(options.out / "merged", merged, names, like=folder)

    runs = {"LoRA": history}
    result: dict[str, Any] = {
        "settings": {
            "base": options.base,
            "rank": options.rank,
            "alpha": 2 * options.rank,
            "lr": options.lr,
            "targets": options.targets,
        }
        | shared,
        "sentences": {"train": len(train.labels), "validation": len(validation.labels), "test": len(test.labels)},
        "accuracy": {"head alone": accuracy(head_logits, test.labels), "LoRA": accuracy(logits, test.labels)},
        "parameters": {"base": report.size(merged), "head": report.size(head), "LoRA": report.size(trainable)},
        "bytes": {"adapter": report.bytes_on_disk(options.out / "adapter"), "base": report.bytes_in_memory(variables)},
        "merged": {
            "max_abs_difference": float(np.abs(logits - merged_logits).max()),
            "largest_logit": float(np.abs(logits).max()),
            "accuracy": accuracy(merged_logits, test.labels),
        },
    }

    # 4. For comparison: every parameter of the encoder.
    if options.full:

        def full_logits(trainable: Any, _: None, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return apply_head(trainable["head"], model.apply(trainable["encoder"], ids, mask))

        trainable = {"encoder": variables, "head": head}
        trained, runs["full"] = fit(
            full_logits, trainable, None, train, validation, name="full", learning_rate=2e-4, **shared
        )
        full = predict(jax.jit(full_logits), trained, None, test)
        result["accuracy"]["full"] = accuracy(full, test.labels)
        result["parameters"]["full"] = report.size(trainable)

    result["seconds"] = time.perf_counter() - started
    print("\n" + report.write(options.out, result, runs))
    if options.results:
        report.record(options.results, (options.base, str(options.seed)), result)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted")
