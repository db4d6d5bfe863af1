"""Evolution strategies with low-rank perturbations (EGGROLL): trains a model on a reward that has no gradient.

python examples/evolution.py                  # 64 members, 60 generations: a minute on two cores

A generation draws random LoRAs of rank 1 in mirrored pairs, evaluates all of them as one program over one base, and
merges their sum, weighted by their scores, into the base:

    W + step / K * sum_k score_k A_k B_k          which is one LoRA of rank K

Full-rank perturbations would need a copy of every weight for each member, and products that share nothing.

Sarkar et al. 2025, Evolution Strategies at the Hyperscale, arXiv:2511.16652.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jlora
import report  # selects the backend of matplotlib
from report import plt

Reward = Callable[..., jax.Array]  # (params, x, labels) -> (), the higher the better


def population(key: jax.Array, sites: jlora.Sites, members: int, sigma: float) -> jlora.Adapter:
    """Random perturbations W + sigma A B of rank 1, as one adapter with a leading axis of members.

    The second half mirrors the first, W - sigma A B, so that what all members have in common cancels in the sum.
    """
    normal = jax.nn.initializers.normal(1.0)
    method = jlora.LoRA(rank=1, alpha=sigma, a_init=normal, b_init=normal)
    half = jax.vmap(lambda key: jlora.init(key, sites, {".*": method}))(jax.random.split(key, members // 2))

    def mirrored(update: jlora.Update) -> jlora.Update:
        a, b = update.factors["a"], update.factors["b"]
        return dataclasses.replace(update, factors={"a": jnp.concatenate([a, a]), "b": jnp.concatenate([b, -b])})

    return {path: mirrored(update) for path, update in half.items()}


def estimate(members: jlora.Adapter, scores: jax.Array, step: float) -> jlora.Adapter:
    """The change step / K * sum_k score_k A_k B_k as a LoRA of rank K: the pairs of all members side by side."""

    def joined(update: jlora.Update) -> jlora.Update:
        a, b = update.factors["a"][..., 0], update.factors["b"][..., 0, :]  # (K, *stack, in) and (K, *stack, out)
        b = b * scores.reshape(-1, *[1] * (b.ndim - 1))
        factors = {"a": jnp.moveaxis(a, 0, -1), "b": jnp.moveaxis(b, 0, -2)}
        return dataclasses.replace(update, method=jlora.LoRA(rank=len(scores), alpha=step), factors=factors)

    return {path: joined(update) for path, update in members.items()}


def evaluate(reward: Reward, params: Any, members: jlora.Adapter, *batch: jax.Array) -> jax.Array:
    """The reward of every member on the same batch, (members,)."""
    return jax.vmap(jlora.adapt(reward), (None, 0, *[None] * len(batch)))(params, members, *batch)


def generation(
    reward: Reward, sites: jlora.Sites, options: argparse.Namespace, params: Any, key: jax.Array, *batch: jax.Array
) -> tuple[Any, jax.Array]:
    """The parameters after one generation, and the mean reward of its members."""
    members = population(key, sites, options.members, options.sigma)
    rewards = evaluate(reward, params, members, *batch)
    scores = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
    return jlora.merge(params, estimate(members, scores, options.step)), rewards.mean()


# A model and a reward, neither of which knows of all this.


def init(key: jax.Array, width: int, layers: int = 2) -> dict[str, Any]:
    """Random parameters of `model`."""
    shapes = {
        "in": (2, width),
        "layers": {"up": (layers, width, 2 * width), "down": (layers, 2 * width, width)},
        "out": (width, 2),
    }
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    keys = jax.random.split(key, len(leaves))
    values = [jax.random.normal(k, shape) / shape[-2] ** 0.5 for k, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, values)


def model(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Residual layers in a scan; logits (rows, 2) of points (rows, 2)."""

    def layer(h: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        normalised = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)
        return h + jax.nn.gelu(normalised @ weights["up"]) @ weights["down"], None

    h, _ = jax.lax.scan(layer, jnp.tanh(x @ params["in"]), params["layers"])
    return h @ params["out"]


def points(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Points of a square, and labels that alternate between its quadrants: the parity of two signs."""
    x = jax.random.uniform(key, (count, 2), minval=-1.0, maxval=1.0)
    return x, (x > 0).sum(axis=-1) % 2


def share_correct(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of points with the correct class: a step function of the parameters, whose gradient is zero."""
    return (model(params, x).argmax(axis=-1) == labels).mean()


def log_likelihood(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean log likelihood of the labels: a smooth reward, with which estimates are compared to the gradient."""
    return jnp.take_along_axis(jax.nn.log_softmax(model(params, x)), labels[:, None], axis=-1).mean()


def cosines(members: int, key: jax.Array, width: int = 16) -> tuple[float, float]:
    """The cosines of two estimates with the gradient of `log_likelihood`: of rank 1, and of full rank.

    The estimate of full rank is that for small perturbations, the sum of (g . E) E over pairs, with Gaussian E.
    """
    params, batch = init(jax.random.key(1), width), points(jax.random.key(2), 64)
    sites = jlora.trace(log_likelihood, params, *batch)

    @jax.jit
    def change_and_gradient(params: Any, key: jax.Array) -> Any:
        perturbed = population(key, sites, members, sigma=0.01)
        rewards = evaluate(log_likelihood, params, perturbed, *batch)
        new = jlora.merge(params, estimate(perturbed, rewards - rewards.mean(), step=1.0))
        return jax.tree.map(jnp.subtract, new, params), jax.grad(log_likelihood)(params, *batch)

    change, gradient = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in jax.device_get(change_and_gradient(params, key))
    )
    noise = np.random.default_rng(members).normal(size=(members // 2, gradient.size))
    return _cosine(change, gradient), _cosine((noise @ gradient) @ noise, gradient)


def _cosine(u: np.ndarray, v: np.ndarray) -> float:
    return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))


def flops(function: Callable[..., Any], *args: Any) -> float:
    """The floating-point operations of a compiled program; the body of a loop counts once."""
    costs = jax.jit(function).lower(*args).compile().cost_analysis()
    assert costs is not None
    return costs["flops"]


def cost_ratio(members: int, batch: int, width: int) -> float:
    """The FLOPs of the rewards of all members over those of the base on as many points; compiles both, runs neither."""
    shape, key = jax.eval_shape, jax.random.key(0)
    params, *one = shape(lambda: (init(key, width), *points(key, batch)))
    sites = jlora.trace(model, params, one[0])
    perturbed = shape(lambda: population(key, sites, members, sigma=0.1))
    rewards = flops(functools.partial(evaluate, share_correct), params, perturbed, *one)
    return rewards / flops(share_correct, params, *shape(lambda: points(key, members * batch)))


def train(options: argparse.Namespace) -> list[float]:
    """Runs all generations; returns the share of test points with the correct class, before and after each."""
    params = jax.jit(functools.partial(init, width=options.width))(jax.random.key(options.seed))
    x, labels = points(jax.random.key(1), 1024)
    sites = jlora.trace(model, params, x)
    next_generation = jax.jit(functools.partial(generation, share_correct, sites, options))
    test = jax.jit(share_correct)
    accuracies = [float(test(params, x, labels))]
    interval = 0.2 if sys.stderr.isatty() else 20.0
    keys = jax.random.split(jax.random.key(options.seed + 2), options.generations)
    for key in tqdm(keys, "generations", mininterval=interval, dynamic_ncols=True):
        draw_key, batch_key = jax.random.split(key)
        params, _ = next_generation(params, draw_key, *points(batch_key, options.batch))
        accuracies.append(float(test(params, x, labels)))
    return accuracies


def draw(path: Path, accuracies: list[float], directions: dict[int, tuple[float, float]]) -> None:
    """Draws the accuracy by generation, and the cosines with the gradient by members."""
    with plt.rc_context(report.STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), dpi=130, layout="constrained")
        left.plot([100 * value for value in accuracies], color="#1f6f8b", linewidth=2)
        left.set(
            title="A reward without a gradient", xlabel="generation", ylabel="correct test points (%)", ylim=(40, 101)
        )
        low, full = zip(*directions.values(), strict=True)
        right.plot(list(directions), full, "s--", color="#6c757d", label="full rank")
        right.plot(list(directions), low, "o-", color="#1f6f8b", linewidth=2, label="rank 1")
        right.set(title="Cosine with the gradient of a smooth reward", xlabel="members", xscale="log", ylim=(0, 1))
        right.legend()
        figure.savefig(path)
        plt.close(figure)


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--members", type=int, default=64, help="of a generation, an even number (default: 64)")
    parser.add_argument("--generations", type=int, default=60, help="default: 60")
    parser.add_argument("--batch", type=int, default=128, help="points on which members are scored (default: 128)")
    parser.add_argument("--width", type=int, default=256, help="of the model (default: 256)")
    parser.add_argument("--sigma", type=float, default=0.05, help="scale of the perturbations (default: 0.05)")
    parser.add_argument("--step", type=float, default=0.05, help="scale of the change of a generation (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, default=Path("runs/evolution.png"), help="default: runs/evolution.png")
    options = parser.parse_args(args)
    if options.members < 2 or options.members % 2:
        parser.error("--members must be even: perturbations come in mirrored pairs")
    return options


def main() -> None:
    """Trains, measures, prints and draws."""
    options = arguments()
    accuracies = train(options)
    directions = {members: cosines(members, jax.random.key(0)) for members in (16, 64, 256, 1024, 4096)}
    print(
        f"correct test points: {accuracies[0]:.1%} before, {accuracies[-1]:.1%} after {options.generations} generations"
    )
    ratio = cost_ratio(options.members, options.batch, options.width)
    print(f"FLOPs of {options.members} members over those of the base on as many points: {ratio:.4f}")
    for members, (low, full) in directions.items():
        print(f"cosine with the gradient, {members:4} members: rank 1 {low:.3f}, full rank {full:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(options.out, accuracies, directions)
    result = {
        "environment": report.environment(),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "accuracies": list(map(float, accuracies)),
        "FLOPs / base": ratio,
        "cosines": {members: {"rank 1": low, "full rank": full} for members, (low, full) in directions.items()},
    }
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
