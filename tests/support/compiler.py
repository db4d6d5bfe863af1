"""The compiler's settings under which tests run.

Tests ask what a program means, not how fast it runs, and compiling takes most of their time. So the most expensive
passes are left out.
"""

import importlib.metadata
from typing import Any

OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    # The emitters of fusions take three quarters of the time to compile.
    OPTIONS |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

# The same for all programs of a process.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
