"""The interpreter: evaluates a jaxpr with adapted weights in the place of weights."""
