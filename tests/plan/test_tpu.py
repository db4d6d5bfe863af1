"""Plans by the TPU compiler: these tests exist if libtpu is installed."""

import importlib.util

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

import jlora
from benchmarks import plan as benchmark
from benchmarks._llama import Sizes
from benchmarks._plan_report import count_weight_gathers
from benchmarks._plan_rows import Row
from jlora._plan import topology as _topology
from tests.support.plans import abstract, chain

if importlib.util.find_spec("libtpu"):

    @pytest.mark.parametrize("name", ["v5e:2x4", "v4:2x2x2", "v6e:2x4"])
    def test_on_a_tpu(name):
        """The figures of the CPU, but that each device keeps a part of each sum, in the type of the TPU's choice."""
        plan = jlora.plan(chain, abstract((64, 512), "x"), abstract((5, 512, 512), None, "y"), topology=name)
        assert (plan.devices, plan.fits, plan.exact) == (8, True, True)
        assert plan.hbm is not None
        assert 0 < plan.needed < plan.hbm
        assert plan.flops == 5 * 2 * 16 * 512 * 256
        assert [(c.kind, c.count, c.exact) for c in plan.collectives] == [("reduce-scatter", 5, True)]
        assert plan.collectives[0].bytes in (16 * 512 * 2, 16 * 512 * 4)

    def test_a_mesh_that_is_no_product_of_the_torus():
        mesh = AbstractMesh((8, 8), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
        plan = jlora.plan(lambda x: x @ x, abstract((64, 64), "x", "y", mesh=mesh), topology="v5p:4x4x4")
        assert plan.devices == 64
        assert plan.collectives

    @pytest.mark.parametrize("base", ["bf16", "nf4"])
    def test_no_more_than_by_hand(base):
        """Four scanned layers take what LoRA written into the model takes, and gather its weights as often."""
        sizes = Sizes(4, 2048, 8192, 16, 8, vocabulary=8192)
        row = Row(sizes, "v5e:2x4", (1, 2, 4), 2, base=base)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            ours, by_hand = (benchmark.measure(row, form) for form in ("jlora", "by hand"))
        assert ours["temporary_bytes"] <= 1.02 * by_hand["temporary_bytes"]
        assert ours["flops"] <= 1.005 * by_hand["flops"]
        assert count_weight_gathers(row, ours) <= count_weight_gathers(row, by_hand)

    def test_what_does_not_fit():
        """The refusal comes back with the compiler's figures."""
        x = abstract((8, 2**32), "x", "y")
        plan = jlora.plan(lambda x: x.sum(), x, topology="v5e:2x4")
        assert plan.fits is False
        assert plan.needed == 2 * 2**31 * 4
        assert plan.hbm == int(15.75 * 2**30)
        assert "does not fit, 16 GiB of 15.75 GiB a device" in str(plan)

    @pytest.mark.parametrize("name", ["v5e:3x5", "v9z:2x2", "nonsense"])
    def test_unknown_topologies(name):
        with pytest.raises(ValueError, match=rf"no topology '{name}'.*v5e:16x16"):
            jlora.topology(name)

    def test_every_generation_is_known():
        for name in ("v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
            devices = jlora.topology(name)
            assert devices is jlora.topology(name)
            assert _topology.hbm(devices[0]) is not None
