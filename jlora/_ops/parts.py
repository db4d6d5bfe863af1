"""Products over parts of an axis that devices divide, the base together with its networks, so that they share one sum.

in axis:    y = sum over c of (x_c W_c + x_c A_c B_c)        the sum is that of the devices' results
out axis:   y_c = x_c W_c + x_c A_c B_c,    x_c = x          and of their gradients of x, the transpose of x_c = x
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._ir.weight import TensorNetwork
from jlora._ops.contraction import apply_network


def common_part(networks: Sequence[TensorNetwork], x: str, weight: str, out: str) -> str:
    """The index that divides the product, for all networks the same; empty if no index does.

    Arguments:
        networks: of the weight.
        x, weight, out: the indices of the activation, of the weight, and of the result.
    """
    if not networks or not all(network.in_parts for network in networks):
        return ""
    matrix = [c for c in weight if (c in x) != (c in out)]
    return next((c for c in matrix if all(_is_block_diagonal(n, c, weight) for n in networks)), "")


def _is_block_diagonal(network: TensorNetwork, index: str, weight: str) -> bool:
    """Whether at least two factors have the index, and each of them an index that is summed."""
    terms = [term for term in network.terms if index in term]
    return len(terms) > 1 and all(any(c not in weight for c in term) for term in terms)


def product_in_parts(
    x: jax.Array,
    base: jax.Array,
    networks: Sequence[TensorNetwork],
    part: str,
    terms: tuple[str, str, str],
    sizes: dict[str, int],
    dtype: jnp.dtype,
    precision: Any,
) -> jax.Array:
    """The product with a weight, divided along one index.

    Arguments:
        x, base: the activation, and the base of the weight.
        networks: of the weight.
        part: the index.
        terms: the indices of x, of the weight, and of the result.
        sizes: of all indices.
        dtype, precision: of the program's product.

    Returns:
        the result, with an axis for each of its indices.
    """
    x_term, weight_term, out = terms
    x, base = (a.reshape([sizes[c] for c in term]) for a, term in ((x, x_term), (base, weight_term)))
    is_summed = part in x_term
    if is_summed:
        out = part + out
    else:
        x, x_term = jnp.broadcast_to(x, (sizes[part], *x.shape)), part + x_term
    y = jnp.einsum(f"{x_term},{weight_term}->{out}", x, base, precision=precision, preferred_element_type=dtype)
    for network in networks:
        z = apply_network(x, x_term, network, out, dtype=y.dtype, precision=precision)
        y = y + jnp.broadcast_to(z, y.shape)
    return y.sum(0) if is_summed else y
