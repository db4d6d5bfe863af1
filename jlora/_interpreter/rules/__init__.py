"""What each JAX primitive does to an adapted weight: one file for each subject, one function for each rule.

Importing this package registers jlora's rules. `registry.py` states what a rule is.
"""

from jlora._interpreter.rules import (
    arithmetic,
    control_flow,
    conv,
    dot_general,
    dynamic_slice,
    gather,
    joining,
    kernels,
    layout,
    loops,
    ragged_dot,
    shard_map,
    slicing,
)
from jlora._interpreter.rules.registry import RULES, register_rule

__all__ = [
    "RULES",
    "arithmetic",
    "control_flow",
    "conv",
    "dot_general",
    "dynamic_slice",
    "gather",
    "joining",
    "kernels",
    "layout",
    "loops",
    "ragged_dot",
    "register_rule",
    "shard_map",
    "slicing",
]
