"""Many adapters at once: compiled costs of a bank, training eight jobs together, serving thousands, and swaps.

    PYTHONPATH=examples python -m benchmarks.many              # everything, about ten minutes
    PYTHONPATH=examples python -m benchmarks.many --rounds 0   # compiled costs alone

costs   a bank of 16 adapters on 16 batches against one adapter on the same tokens: FLOPs and temporary bytes, forward
        and gradient, unrolled and scanned; a step of decoding.
jobs    eight small fine-tuning jobs as one program against one after the other, in turns.
serving SmolLM2-135M (random weights) decodes batches whose rows use different adapters of a pool: 2,000 adapters in
        skewed arrivals against 5, rows of different adapters against rows of one, and what a swap takes.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jlora
import serve_many
import smollm
from benchmarks import _measure, _transformer
from benchmarks._measure import Bar
from benchmarks._transformer import Sizes

MEMBERS, JOBS, RANK = 16, 8, 8
TARGETS = r"layers/(.*/)?w."
SMOLLM = smollm.Config(49152, 576, 1536, 30, 9, 3, 1e-5, 1e5)
ROWS, POSITIONS, STEPS = 32, 96, 48


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def model(form: str, sizes: Sizes) -> tuple[Callable[..., jax.Array], Any]:
    """The loss of a form as a function of parameters and tokens, and the shapes of the parameters."""
    params = jax.eval_shape(lambda: _transformer.init(jax.random.key(0), sizes))
    forward = functools.partial(getattr(_transformer, form), heads=sizes.heads)
    if form == "scanned":
        params = jax.eval_shape(_transformer.stack, params)
        forward = jax.checkpoint(forward, policy=jax.checkpoint_policies.save_only_these_names("jlora"))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = forward(params, tokens[..., :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[..., 1:]).mean()

    return loss, params


def costs(form: str, ranks: tuple[int, ...]) -> tuple[dict[str, Any], list[Bar]]:
    """FLOPs and temporary bytes of a bank, as ratios to one adapter of the highest rank on the same tokens."""
    sizes = Sizes(layers=2, length=65)
    loss, params = model(form, sizes)
    together, alone = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((MEMBERS, 2, 65), (2 * MEMBERS, 65)))
    sites = jlora.trace(loss, params, alone)

    def init(rank: int) -> Any:
        return jlora.init(jax.random.key(0), sites, {TARGETS: jlora.LoRA(rank)})

    def stacked() -> Any:
        return jlora.bank.stack({str(k): init(ranks[k % len(ranks)]) for k in range(MEMBERS)})

    one, bank = jax.eval_shape(lambda: init(max(ranks))), jax.eval_shape(stacked)
    mapped, adapted = jlora.bank.vmap(loss), jlora.adapt(loss)
    programs = {
        "forward": ((mapped, params, bank, together), (adapted, params, one, alone)),
        "gradient": (
            (lambda p, b, x: jax.grad(lambda b: mapped(p, b, x).sum())(b), params, bank, together),
            (lambda p, a, x: jax.grad(lambda a: adapted(p, a, x))(a), params, one, alone),
        ),
    }
    rows, bars = {}, []
    for name, (many, single) in programs.items():
        a, b = (_measure.compile(*program) for program in (many, single))
        label = f"{form}, ranks {'/'.join(map(str, ranks))}, {name}"
        rows[label] = {"flops": a.flops / b.flops, "temporaries": a.temp_bytes / b.temp_bytes}
        bars.append(Bar(f"{label}: FLOPs", a.flops / b.flops, 1.01))
        limit = 1.20 if form == "scanned" else 1.05
        bars.append(Bar(f"{label}: temporary bytes", a.temp_bytes / b.temp_bytes, limit))
    return rows, bars


class Decoder:
    """SmolLM2 with random weights, and its step of decoding with a cache."""

    def __init__(self) -> None:
        graph, params = nnx.split(nnx.eval_shape(lambda: smollm.SmolLM(SMOLLM, nnx.Rngs(0))))
        self.forward = smollm.forward(graph)
        rng = np.random.default_rng(0)
        self.params = jax.tree.map(lambda a: jnp.asarray(0.02 * rng.standard_normal(a.shape, np.float32)), params)
        self.cache = smollm.empty_cache(SMOLLM, ROWS, POSITIONS)
        token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        sites = jlora.trace(
            self.forward, shapes(self.params), token, shapes(smollm.empty_cache(SMOLLM, 1, POSITIONS)), 0
        )
        self.targets = {r".*/(query|value)/kernel(/value)?": jlora.LoRA(RANK)}
        self.like = jlora.init(jax.random.key(0), sites, self.targets)

    def step(self, params: Any, token: jax.Array, cache: Any, position: Any) -> tuple[jax.Array, Any]:
        logits, cache = self.forward(params, token, cache, position)
        return logits[:, -1].argmax(-1).astype(jnp.int32), cache

    def decode(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """`STEPS` steps as one program: `(params, adapters, ids, cache) -> tokens`."""

        def run(params: Any, adapters: Any, ids: Any, cache: Any) -> jax.Array:
            def body(carry: Any, position: Any) -> tuple[Any, jax.Array]:
                token, cache = carry
                token, cache = step(params, adapters, ids, token[:, None], cache, position)
                return (token, cache), token

            start = (jnp.zeros(ROWS, jnp.int32), cache)
            return jax.lax.scan(body, start, jnp.arange(STEPS))[1]

        return run

    def many(self) -> Callable[..., Any]:
        """A step whose rows use the adapters of a bank that `ids` name."""
        return jlora.bank.apply(self.step, in_axes=(0, 1, None), out_axes=(0, 1))

    def single(self) -> Callable[..., Any]:
        """A step in which one adapter serves all rows."""
        adapted = jlora.adapt(self.step)
        return lambda params, adapter, ids, *args: adapted(params, adapter, *args)


def decoding_costs(decoder: Decoder) -> tuple[dict[str, Any], list[Bar]]:
    """One step: temporary bytes against those of one adapter and of the factors of all layers and rows."""
    bank = jlora.bank.stack({str(k): decoder.like for k in range(64)})
    token, ids = np.zeros((ROWS, 1), np.int32), np.zeros(ROWS, np.int32)
    many = _measure.compile(decoder.many(), decoder.params, bank, ids, token, decoder.cache, 3)
    one = _measure.compile(decoder.single(), decoder.params, decoder.like, ids, token, decoder.cache, 3)
    gathered = ROWS * sum(a.nbytes for a in jax.tree.leaves(bank)) // 64
    value = many.temp_bytes / (gathered + 1.05 * one.temp_bytes)
    row = {"flops": many.flops / one.flops, "temporaries": many.temp_bytes, "gathered": gathered, "one": one.temp_bytes}
    return {"decoding": row}, [
        Bar("decoding: temporary bytes / (gathered factors + 1.05 of one adapter's)", value, 1.0)
    ]


def jobs(rounds: int) -> tuple[dict[str, Any], list[Bar]]:
    """Eight small jobs: a step of all as one program against eight steps, one after the other."""
    sizes = Sizes(layers=4, length=17)
    loss, _ = model("unrolled", sizes)
    params = _transformer.init(jax.random.key(0), sizes)
    tokens = jax.random.randint(jax.random.key(1), (JOBS, 1, 17), 0, sizes.vocabulary)
    sites = jlora.trace(loss, params, tokens[0])
    keys = jax.random.split(jax.random.key(2), JOBS)
    adapters: list[Any] = [jlora.init(key, sites, {TARGETS: jlora.LoRA(RANK)}) for key in keys]
    bank: Any = jlora.bank.stack({str(k): adapter for k, adapter in enumerate(adapters)})
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    joint, single = jlora.bank.optimiser(tx), optax.masked(tx, jlora.mask)

    @jax.jit
    def together(params: Any, bank: Any, state: Any, tokens: jax.Array) -> Any:
        gradient = jax.grad(lambda bank: jlora.bank.vmap(loss)(params, bank, tokens).sum())(bank)
        updates, state = joint.update(gradient, state, bank)
        return optax.apply_updates(bank, updates), state

    @jax.jit
    def alone(params: Any, adapter: Any, state: Any, tokens: jax.Array) -> Any:
        gradient = jax.grad(lambda adapter: jlora.adapt(loss)(params, adapter, tokens))(adapter)
        updates, state = single.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state

    states, state = [single.init(adapter) for adapter in adapters], joint.init(bank)
    calls = {
        "together": lambda: together(params, bank, state, tokens),
        "in turn": lambda: [alone(params, *job) for job in zip(adapters, states, tokens, strict=True)],
    }
    seconds = _measure.interleave(calls, rounds)
    speed = _measure.ratio(seconds, "in turn", "together")
    rows = {
        name: {"milliseconds": 1e3 * (_measure.median(times) or 0), "rounds": times} for name, times in seconds.items()
    }
    return {"jobs": rows | {"speed-up": speed}}, [Bar("jobs: 1.46 / speed-up of eight together", 1.46 / speed, 1.0)]


def serving(decoder: Decoder, rounds: int, adapters: int, slots: int) -> tuple[dict[str, Any], list[Bar]]:
    """Rates of decoding, and the time of a swap against a compilation."""
    many = jax.jit(decoder.decode(decoder.many()))
    single = jax.jit(decoder.decode(decoder.single()))
    rng = np.random.default_rng(0)
    pools = {}
    for count in (5, adapters):
        pools[count] = jlora.bank.Pool(decoder.like, slots)
        for k in range(count):
            pools[count].put(str(k), serve_many.stand_in(decoder.like, str(k)))

    def serve(count: int) -> Any:
        """A batch of requests, most of them for the adapters that are asked for most."""
        with pools[count].use(serve_many.skewed_names(rng, count, ROWS)) as (bank, ids):
            return many(decoder.params, bank, ids, decoder.cache)

    def same() -> Any:
        with pools[5].use(["0"] * ROWS) as (bank, ids):
            return many(decoder.params, bank, ids, decoder.cache)

    calls = {
        "5 adapters": lambda: serve(5),
        f"{adapters:,} adapters": lambda: serve(adapters),
        "rows of one adapter of the pool": same,
        "one adapter, no bank": lambda: single(decoder.params, decoder.like, None, decoder.cache),
    }
    seconds = _measure.interleave(calls, rounds)
    names = list(calls)
    rates = {
        name: {"tokens/s": ROWS * STEPS / (_measure.median(times) or 1), "rounds": times}
        for name, times in seconds.items()
    }
    thousands = _measure.ratio(seconds, names[1], names[0])
    mixed = _measure.ratio(seconds, names[0], names[3])
    swap, compilation = swap_and_compilation(decoder, pools[adapters])
    pool = pools[adapters]
    expected = slots * sum(a.nbytes for a in jax.tree.leaves(decoder.like))
    expected += slots * len(decoder.like) * 4 * (1 + RANK)
    rows = rates | {
        "swap": {"milliseconds": 1e3 * swap, "compilation in seconds": compilation},
        "pool": {"bytes": pool.nbytes, "computed": expected, "adapters": adapters, "slots": slots},
    }
    return {"serving": rows}, [
        Bar(f"serving: time of {adapters:,} adapters / 5 (0.945 of the rate)", thousands, 1 / 0.945),
        Bar("serving: time of mixed rows / one adapter (0.9 of the rate)", mixed, 1 / 0.9),
        Bar("serving: swap / compilation", swap / compilation, 0.1),
        Bar("serving: bytes of the pool / computed", pool.nbytes / expected, 1.0),
    ]


def swap_and_compilation(decoder: Decoder, pool: jlora.bank.Pool) -> tuple[float, float]:
    """Seconds to copy an adapter into a slot, and to compile the program for an adapter of another rank."""
    times = []
    absent = [name for name in map(str, range(pool.slots + 20)) if name not in pool.resident and name in pool]
    for name in absent[:20]:
        begin = time.perf_counter()
        pool.ids([name])
        jax.block_until_ready(pool.bank)
        times.append(time.perf_counter() - begin)
    token = np.zeros((ROWS, 1), np.int32)
    begin = time.perf_counter()
    jax.jit(decoder.single()).lower(decoder.params, decoder.like, None, token, decoder.cache, 3).compile()
    return float(np.median(times)), time.perf_counter() - begin


def main() -> None:
    parser = _measure.parser(__doc__, "many.json")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5; 0 compiles alone)")
    parser.add_argument("--adapters", type=int, default=2000, help="in the pool (default: 2000)")
    parser.add_argument("--slots", type=int, default=64, help="of the pool (default: 64)")
    options: argparse.Namespace = parser.parse_args()
    decoder = Decoder()
    parts = [costs(form, ranks) for form in ("unrolled", "scanned") for ranks in ((RANK,), (2, 4, RANK))]
    parts.append(decoding_costs(decoder))
    if options.rounds:
        parts += [jobs(4 * options.rounds), serving(decoder, options.rounds, options.adapters, options.slots)]
    rows = {name: row for part, _ in parts for name, row in part.items()}
    bars = [bar for _, part in parts for bar in part]
    for name, row in rows.items():
        print(f"{name}: {row}")
    print(_measure.verdicts(bars))
    if options.rounds:
        verdicts = [{"name": bar.name, "value": bar.value, "limit": bar.limit, "passed": bar.passed} for bar in bars]
        _measure.save(options.out, {"environment": _measure.environment(), "rows": rows, "bars": verdicts})


if __name__ == "__main__":
    main()
