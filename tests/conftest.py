"""Settings under which every test runs: strict promotion, raised rank promotion, checked leaks."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices; and machine code as it comes, since most of the time here goes into compiling.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
