"""Figures of GPUs, and the description of a GPU that XLA's compiler takes in place of one."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Core:
    """A streaming multiprocessor, by compute capability.

    Arguments:
        fpus: float32 units.
        shared: bytes of shared memory.
        shared_by_block: bytes of it that one block of threads may ask for.
        threads: how many threads can be resident.
        accelerated: whether the capability has features that other cards of its major number lack (`sm_90a`).
    """

    fpus: int
    shared: int
    shared_by_block: int
    threads: int
    accelerated: bool = False


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU.

    Arguments:
        name: as CUDA calls it.
        capability: its compute capability.
        cores: how many streaming multiprocessors it has.
        clock: of the cores, GHz.
        cache: bytes of its L2 cache.
        bandwidth: of its memory, bytes a second.
        memory: bytes of its memory, as CUDA reports them. Drivers differ by up to 0.2 GiB: the lowest.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock: float
    cache: int
    bandwidth: int
    memory: int


# CUDA C++ Programming Guide, technical specifications of compute capabilities.
CORES: Mapping[tuple[int, int], Core] = MappingProxyType(
    {
        (8, 0): Core(64, 167936, 166912, 2048),
        (8, 6): Core(128, 102400, 101376, 1536),
        (8, 9): Core(128, 102400, 101376, 1536),
        (9, 0): Core(128, 233472, 232448, 2048, accelerated=True),
        (10, 0): Core(128, 233472, 232448, 2048, accelerated=True),
        (12, 0): Core(128, 131072, 101376, 1536),
    }
)

_MB, _GB = 2**20, 10**9

# Cores, clocks, caches and bandwidths: the descriptions of these cards in XLA's own repository
# (xla/backends/gpu/target_config/specs), and for L4, L40S and RTX 4090 NVIDIA's data sheets. The memory of H200,
# RTX PRO 6000, L4, L40S and RTX 4090 is what CUDA reports of real ones; the nominal size is larger.
CARDS: Mapping[str, Card] = MappingProxyType(
    {
        "a100-40": Card("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1.41, 40 * _MB, 1555200000000, 42331013120),
        "a100-80": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 * _MB, 2039040000000, 85100068864),
        "a6000": Card("NVIDIA RTX A6000", (8, 6), 84, 1.8, 6 * _MB, 768096000000, 51041271808),
        "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 * _MB, 3352320000000, 84942979072),
        "h200": Card("NVIDIA H200", (9, 0), 132, 1.98, 50 * _MB, 4800 * _GB, 143155 * _MB),
        "b200": Card("NVIDIA B200", (10, 0), 148, 1.965, 132644864, 7672320000000, 191514411008),
        "rtx6000pro": Card("NVIDIA RTX PRO 6000 Blackwell", (12, 0), 188, 2.6, 128 * _MB, 1792 * _GB, 97249 * _MB),
        "l4": Card("NVIDIA L4", (8, 9), 58, 2.04, 48 * _MB, 300 * _GB, 22558 * _MB),
        "l40s": Card("NVIDIA L40S", (8, 9), 142, 2.52, 96 * _MB, 864 * _GB, 45455 * _MB),
        "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 72 * _MB, 1008 * _GB, 24084 * _MB),
    }
)


def target_config(card: Card) -> str:
    """The card as XLA's `GpuTargetConfigProto` in text form."""
    (major, minor), core = card.capability, CORES[card.capability]
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {core.shared_by_block}
  shared_memory_per_core: {core.shared}
  threads_per_core_limit: {core.threads}
  fpus_per_core: {core.fpus}
  core_count: {card.cores}
  clock_rate_ghz: {card.clock}
  l2_cache_size: {card.cache}
  memory_bandwidth: {card.bandwidth}
  device_memory_size: {card.memory}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {"ACCELERATED_FEATURES" if core.accelerated else "NONE"}
  }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{card.name}"
"""
