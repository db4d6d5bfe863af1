"""A rule for your own primitive, so that a weight which goes through it stays factored.

The primitive reverses the axes of an array. Without the rule jlora would materialise the weight, and warn.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

import jlora
from jlora import extend

reverse_axes_p = Primitive("reverse_axes")
reverse_axes_p.def_impl(lambda a: a.T)
reverse_axes_p.def_abstract_eval(lambda a: jax.typeof(jax.ShapeDtypeStruct(a.shape[::-1], a.dtype)))
ad.deflinear2(reverse_axes_p, lambda cotangent, _: [reverse_axes_p.bind(cotangent)])
mlir.register_lowering(reverse_axes_p, mlir.lower_fun(lambda a: a.T, multiple_results=False))


@extend.register_rule(reverse_axes_p)
def reverse_axes(ctx: extend.Context, eqn, weight: extend.AdaptedWeight) -> list[extend.AdaptedWeight]:
    """The base goes through the primitive; the indices of the weight, and with them its update, change their order."""
    (base,) = extend.bind(eqn, weight.base)
    return [extend.relabel(weight, base, weight.axes[::-1])]


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (8, 16))}
    x = jax.random.normal(keys[1], (4, 8))

    def model(params, x):
        return x @ reverse_axes_p.bind(reverse_axes_p.bind(params["w"]).T).T

    def transposed(params, x):
        return reverse_axes_p.bind(params["w"]) @ x.T

    for fun in (model, transposed):
        adapter = jlora.init(keys[2], jlora.trace(fun, params, x), jlora.LoRA(rank=2))
        adapter = jax.tree.map(lambda a: a + 0.1, adapter)
        print(jlora.explain(fun, params, adapter, x))
        adapted = jax.jit(jlora.adapt(fun, on_dense="error"))(params, adapter, x)
        assert jnp.allclose(adapted, fun(jlora.merge(params, adapter), x), rtol=1e-4, atol=1e-4)
    print("adapted and merged agree")


if __name__ == "__main__":
    main()
