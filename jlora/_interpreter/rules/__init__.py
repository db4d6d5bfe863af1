"""What each JAX primitive does to a weight that carries networks.

A rule is `rule(ctx, eqn, *values) -> values`, with at least one `Factored` among its values. It returns None where it
cannot keep the weight factored, and the weight is formed.
"""

from jlora._interpreter.rules import conv, dot_general, gather
from jlora._interpreter.rules import layout as structural

RULES = {**structural.RULES, **dot_general.RULES, **gather.RULES, **conv.RULES}
