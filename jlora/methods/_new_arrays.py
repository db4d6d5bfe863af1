"""The arrays of a new update, checked against what its method declares."""

import math

import jax
from jax.typing import DTypeLike

from jlora._interpreter.site import Site
from jlora.methods._base import Method
from jlora.methods._common.declarations import check_frozen
from jlora.methods._common.factor_axes import WeightAxes
from jlora.methods._common.hyperparameters import check_hash


def new_arrays(
    method: Method, key: jax.Array, site: Site, dtype: DTypeLike, base: jax.Array | None
) -> dict[str, jax.Array]:
    """The arrays of `method.init`, in the declared shapes.

    Raises:
        TypeError: if a name in `frozen` is not declared, or a hyper-parameter has no hash.
        ValueError: if a declared array is missing, an array is not declared, or it has another number of entries.
    """
    check_hash(method)
    if type(method).factors_for is Method.factors_for:
        check_frozen(type(method).__name__, method.frozen, method.factors)
    arrays, shapes = method.init(key, site, dtype, base), method.shapes(WeightAxes.of(site))
    if not shapes:  # a method without declarations
        return arrays
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if {name: array.size for name, array in arrays.items()} != sizes:
        returned = {name: tuple(array.shape) for name, array in arrays.items()}
        raise ValueError(
            f"{site.path} {site.shape}: {type(method).__name__}.init returned arrays of the shapes {returned}, but the "
            f"method declares {shapes}. Change `init` or `factors`."
        )
    return {name: array.reshape(shapes[name]) for name, array in arrays.items()}
