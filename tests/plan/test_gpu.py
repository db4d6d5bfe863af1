"""Plans for GPUs: errors, what a card's memory is, and, if JAX's CUDA plugin is installed, plans by its compiler."""

import importlib.metadata
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

import jlora
from benchmarks import plan as benchmark
from benchmarks._llama import Sizes
from benchmarks._plan_report import layer_bytes, more_wide
from benchmarks._plan_rows import Row
from jlora._plan import topology as _topology
from jlora._plan.gpu_cards import CARDS, CORES, target_config
from tests.support.plans import abstract, chain

HAS_COMPILER = any(_topology._version(package) for package in _topology._GPU_COMPILERS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10:8", r"There is no topology 'h10:8'\. Did you mean h100"),
        ("rtx409:2", "Did you mean rtx4090"),
        ("gaudi:8", r"GPUs are a100-40, a100-80, .*rtx4090\. Topologies are for example .*h100:8"),
        ("h100", r"write the number of cards, h100:8, or hosts x cards of each, h100:4x8"),
        ("h100:0", "There is no topology 'h100:0'"),
        ("h100:2x2x2", "There is no topology 'h100:2x2x2'"),
        ("h100:3x", "There is no topology 'h100:3x'"),
    ],
)
def test_unknown_cards_and_shapes(name, message):
    with pytest.raises(ValueError, match=message):
        jlora.topology(name)


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, r"requires the CUDA plugin of JAX 0\.10\.9, which needs no GPU: pip install 'jlora\[plan-gpu\]'"),
        (
            {"jax-cuda12-pjrt": "0.10.1"},
            r"jax-cuda12-pjrt in the version of jaxlib, 0\.10\.9, and 0\.10\.1 is installed",
        ),
        ({"jax-cuda13-pjrt": "0.11.0"}, "jax-cuda13-pjrt in the version of jaxlib"),
    ],
)
def test_without_the_compiler(monkeypatch, versions, message):
    def version(package):
        try:
            return ({"jaxlib": "0.10.9"} | versions)[package]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError from None

    monkeypatch.setattr(importlib.metadata, "version", version)
    _topology._gpu.cache_clear()
    with pytest.raises(ImportError, match=message):
        jlora.topology("h100:8")


@pytest.mark.parametrize(
    ("variables", "fraction"),
    [
        ({}, 0.75),
        ({"XLA_CLIENT_MEM_FRACTION": "0.9"}, 0.9),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".5"}, 0.5),
    ],
)
def test_the_memory_that_jax_gives_to_a_program(monkeypatch, variables, fraction):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device = SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    assert _topology.hbm(device) == int(fraction * 84942979072)
    assert f"{100 * fraction:g}% of the card's 79.11 GiB" in str(_topology.leaves_out(device))
    assert _topology.leaves_out(SimpleNamespace(device_kind="TPU v4")) is None


def test_figures_of_cards():
    """Memory is below the nominal size and above 90% of it; each capability is described."""
    nominal = {"a100-40": 40, "a100-80": 80, "a6000": 48, "h100": 80, "h200": 141, "b200": 192}
    nominal |= {"rtx6000pro": 96, "l4": 24, "l40s": 48, "rtx4090": 24}
    assert nominal.keys() == CARDS.keys()
    for key, card in CARDS.items():
        assert 0.9 < card.memory / nominal[key] / 2**30 < 1
        assert card.capability in CORES
        assert f"device_memory_size: {card.memory}\n" in target_config(card)


if HAS_COMPILER:

    @pytest.mark.parametrize("name", ["h100:8", "l4:2x4"])
    def test_on_gpus(name):
        """The figures of the CPU: each of five products with its all-reduce."""
        plan = jlora.plan(chain, abstract((64, 512), "x"), abstract((5, 512, 512), None, "y"), topology=name)
        assert (plan.devices, plan.fits, plan.exact, plan.bytes_accessed) == (8, True, True, None)
        assert plan.flops == 5 * 2 * 16 * 512 * 256
        assert [(c.kind, c.shape, c.count) for c in plan.collectives] == [("all-reduce", "f32[16,512]", 5)]
        assert plan.hbm == int(0.75 * CARDS[name.split(":")[0]].memory)
        assert plan.kernels is not None
        assert plan.kernels.products == 5
        assert plan.kernels.bytes_moved > 5 * (256 * 512 + 16 * 256 + 16 * 512) * 4
        assert "by kernels" in str(plan)
        assert "workspaces of tuned kernels" in str(plan)

    def test_hosts():
        assert [d.process_index for d in jlora.topology("h100:2x4")] == [0] * 4 + [1] * 4

    @pytest.mark.parametrize("card", CARDS)
    def test_every_card(card):
        plan = jlora.plan(lambda x: x @ x, jnp.ones((64, 64), jnp.bfloat16), topology=f"{card}:1")
        assert (plan.device, plan.flops) == (CARDS[card].name, 2 * 64**3)

    def test_what_does_not_fit():
        """The compiler accepts it; the plan compares its bytes with the card's."""
        plan = jlora.plan(lambda x: x.sum(), abstract((8, 2**35), "x", "y"), topology="h100:8")
        assert (plan.fits, plan.refusal) == (False, None)
        assert plan.needed >= 2 * 2**34 * 4
        assert "it does not fit, 128 GiB of 59.33 GiB a device" in str(plan)

    @pytest.mark.parametrize(("base", "card"), [("bf16", "h100"), ("nf4", "h100"), ("bf16", "a100-80")])
    def test_no_more_than_by_hand(base, card):
        """Eight scanned layers take what LoRA written into the model takes, and are dequantised one at a time."""
        sizes = Sizes(8, 2048, 8192, 16, 8, vocabulary=8192, length=2048)
        row = Row(sizes, f"{card}:2", (1, 1, 2), 1, base=base)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            ours, by_hand, merged = (benchmark.measure(row, form) for form in ("jlora", "by hand", "merged"))
        assert ours["temporary_bytes"] <= 1.02 * by_hand["temporary_bytes"]
        assert ours["flops"] <= 1.005 * by_hand["flops"]
        for figure in ("bytes_moved", "float32_bytes", "largest_bytes"):
            assert ours["kernels"][figure] <= 1.01 * by_hand["kernels"][figure]
        kernel = 2048 * 8192 * 2 // 2  # bytes of one layer's largest on a card
        assert ours["kernels"]["largest_bytes"] < sizes.layers * kernel
        assert more_wide(ours, by_hand) == 0
        assert more_wide(merged, by_hand) > 0
        if base == "nf4":
            assert ours["dequantised"]["count"] >= 2 * 7 * sizes.layers - 7
            assert (ours["dequantised"]["kept"], by_hand["dequantised"]["kept"]) == (0, 0)
            assert ours["dequantised"]["bytes"] <= layer_bytes(row) < merged["dequantised"]["bytes"]

    def test_weights_are_not_copied():
        """On few tokens a product moves what its weight takes, with an adapter as without."""
        x = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16)
        params = {name: jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16) for name in ("w1", "w2")}

        def f(params, x):
            return jnp.tanh(x @ params["w1"]) @ params["w2"]

        sites = jlora.trace(f, params, x)
        adapter = jax.eval_shape(lambda: jlora.init(jax.random.key(0), sites, {".*": jlora.LoRA(rank=4)}))
        base = jlora.plan(f, params, x, topology="h100:1")
        adapted = jlora.plan(jlora.adapt(f), params, adapter, x, topology="h100:1")
        assert base.kernels
        assert adapted.kernels
        assert 2 * 1024 * 1024 * 2 <= base.kernels.bytes_moved <= adapted.kernels.bytes_moved
        assert adapted.kernels.bytes_moved <= 1.1 * base.kernels.bytes_moved

    def test_a_mesh_decides_what_a_program_is_for():
        """Under a mesh of GPUs products are written for them, whatever the default device is."""

        def program(devices: int, topology: str) -> str:
            mesh = AbstractMesh((devices,), ("x",), axis_types=(AxisType.Auto,))
            x = abstract((64, 32), mesh=mesh, dtype=jnp.bfloat16)
            params = {"w": abstract((32, 48), mesh=mesh, dtype=jnp.bfloat16)}

            def f(params, x):
                return x @ params["w"]

            adapter = jlora.init(jax.random.key(0), jlora.trace(f, params, x), {"w": jlora.LoRA(rank=4)})
            seen = []

            def step(params, adapter, x):
                seen.append(str(jax.make_jaxpr(jlora.adapt(f))(params, adapter, x)))
                return jlora.adapt(f)(params, adapter, x)

            jlora.plan(step, params, adapter, x, topology=topology)
            return seen[0]

        one, two, cpu = program(1, "h100:1"), program(2, "h100:2"), program(1, "cpu:1")
        assert ["_before_cotangent" in text for text in (one, two, cpu)] == [True, False, False]
        assert two.count("optimization_barrier") == 2
