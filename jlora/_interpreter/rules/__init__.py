"""What each JAX primitive does to an adapted weight.

A rule is `rule(ctx, eqn, *values) -> values`, with at least one `AdaptedWeight` among its values. It returns None if it
cannot keep the weight factored, and the weight is materialised.
"""

from jlora._interpreter.rules import control_flow, conv, dot_general, gather, loops, shard_map
from jlora._interpreter.rules import layout as structural

RULES = {
    **structural.RULES,
    **dot_general.RULES,
    **gather.RULES,
    **conv.RULES,
    **control_flow.RULES,
    **loops.RULES,
    **shard_map.RULES,
}
