"""A pool of slots: which adapters are in them, what a batch gets, and several threads at once."""

import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jlora
from tests.support import toy_model

PARAMS, TOKENS = toy_model.params(), toy_model.tokens()
APPLY = jax.jit(jlora.bank.apply(toy_model.model, block=1))


def adapter(rank: int, seed: int, **options: Any) -> Any:
    return toy_model.adapter(jlora.LoRA(rank, **options), seed)


def pool_of(count: int, slots: int = 3) -> tuple[jlora.bank.Pool, dict[str, Any]]:
    members = {f"adapter {k}": adapter(1 + k % 4, k, alpha=1.0 + k) for k in range(count)}
    pool = jlora.bank.Pool(adapter(4, 0), slots)
    for name, member in members.items():
        pool.put(name, member)
    return pool, members


def test_rows_use_their_adapters_whatever_is_in_the_slots() -> None:
    pool, members = pool_of(8)
    rng = np.random.default_rng(0)
    want: dict[str | None, Any] = {None: toy_model.model(PARAMS, TOKENS)}
    want |= {name: jlora.adapt(toy_model.model)(PARAMS, member, TOKENS) for name, member in members.items()}
    for _ in range(20):
        names = [None if k == 8 else f"adapter {k}" for k in rng.integers(0, 9, 2)]
        with pool.use(names) as (bank, ids):
            out = APPLY(PARAMS, bank, ids, TOKENS)
        for row, name in enumerate(names):
            np.testing.assert_allclose(out[row], want[name][row], rtol=3e-5, atol=3e-5)


def test_the_least_recently_used_adapter_leaves_its_slot() -> None:
    pool, _ = pool_of(5)
    assert pool.ids(["adapter 0", "adapter 1", None, "adapter 2"]).tolist() == [0, 1, -1, 2]
    assert pool.ids(["adapter 0"]).tolist() == [0]
    assert pool.ids(["adapter 3", "adapter 1"]).tolist() == [2, 1]  # adapter 1 is kept, adapter 2 is the oldest
    assert pool.resident == ["adapter 0", "adapter 1", "adapter 3"]
    assert pool.evict() == "adapter 0"
    assert pool.evict("adapter 3") == "adapter 3"
    assert pool.resident == ["adapter 1"]
    assert "adapter 3" in pool


def test_put_replaces_what_is_in_a_slot() -> None:
    pool, _ = pool_of(1)
    pool.ids(["adapter 0"])
    new = adapter(2, 77)
    pool.put("adapter 0", new)
    with pool.use(["adapter 0"] * 2) as (bank, ids):
        out = APPLY(PARAMS, bank, ids, TOKENS)
    np.testing.assert_allclose(out, jlora.adapt(toy_model.model)(PARAMS, new, TOKENS), rtol=3e-5, atol=3e-5)


def test_nothing_is_compiled_again() -> None:
    """Adapters of other ranks, scales and targets under one program."""
    pool, _ = pool_of(12, slots=2)
    run: Any = jax.jit(jlora.bank.apply(toy_model.model, block=1))
    pool.put("one weight", {"mix/kernel": adapter(2, 5)["mix/kernel"]})
    for k in range(40):
        with pool.use([f"adapter {k % 12}", "one weight" if k % 3 else None]) as (bank, ids):
            run(PARAMS, bank, ids, TOKENS)
    assert run._cache_size() == 1


def test_memory() -> None:
    """Slots times the bytes of an adapter of the highest rank, with a scale and a rank mask for each update."""
    pool, like = pool_of(0, slots=5)[0], adapter(4, 0)
    arrays = sum(a.nbytes for a in jax.tree.leaves(like))
    assert pool.nbytes == 5 * (arrays + len(like) * 4 * (1 + 4))
    assert "0 of 5 slots in use" in repr(pool)


def test_eight_threads() -> None:
    """Each gets the results of its own adapters, and none sees a bank that another thread replaced."""
    pool, members = pool_of(12)
    want = {name: np.asarray(jlora.adapt(toy_model.model)(PARAMS, member, TOKENS)) for name, member in members.items()}
    failures: list[Any] = []

    def serve(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for turn in range(25):
                names = [f"adapter {k}" for k in rng.integers(0, 12, 2)]
                if turn % 5 == 4:
                    pool.put(names[0], members[names[0]])
                if turn % 7 == 6 and names[1] in pool.resident:
                    pool.evict()
                with pool.use(names) as (bank, ids):
                    out = APPLY(PARAMS, bank, ids, TOKENS)
                for row, name in enumerate(names):
                    np.testing.assert_allclose(out[row], want[name][row], rtol=3e-5, atol=3e-5)
        except Exception as error:  # any failure of a thread is reported
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_adapters_are_read_from_their_source(tmp_path: Path) -> None:
    members = {"a": adapter(1, 1), "b": adapter(3, 2)}
    jlora.bank.save(tmp_path / "bank", jlora.bank.stack(members))

    def read(name: str) -> Any:
        return members[name]

    for source in (members, read, tmp_path / "bank", str(tmp_path / "bank")):
        pool = jlora.bank.Pool(adapter(4, 0), 1, source=source)
        with pool.use(["b", None]) as (bank, ids):
            out = APPLY(PARAMS, bank, ids, TOKENS)
        want = jlora.adapt(toy_model.model)(PARAMS, members["b"], TOKENS)
        np.testing.assert_allclose(out[0], want[0], rtol=3e-5, atol=3e-5)
        with pytest.raises(KeyError, match="'c'"):
            pool.ids(["c"])
        assert pool.resident == ["b"]


def test_what_does_not_fit() -> None:
    pool, _ = pool_of(4)
    with pytest.raises(KeyError, match=r"no adapter 'adaptor 1'.*adapter 1"):
        pool.ids(["adaptor 1"])
    with pytest.raises(ValueError, match="4 adapters are asked for at once, and the pool has 3 slots"):
        pool.ids([f"adapter {k}" for k in range(4)])
    with pytest.raises(ValueError, match="rank 5, above the bank's 4"):
        pool.put("large", adapter(5, 1))
    with pytest.raises(KeyError, match="in no slot"):
        pool.evict("adapter 0")
    with pytest.raises(KeyError, match="No slot is in use"):
        pool.evict()
    with pytest.raises(ValueError, match="at least one slot"):
        jlora.bank.Pool(adapter(1, 1), 0)
    pool.remove("adapter 0")
    assert "adapter 0" not in pool
    with pytest.raises(KeyError, match="holds no adapter 'adapter 0'"):
        pool.remove("adapter 0")
