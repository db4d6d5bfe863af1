"""Custom kernels with a plain equivalent: the kernel computes the product with the base, the latter that of the update.

The plain function is data of a primitive of jlora's own. For all of JAX this primitive is `op`: it is lowered,
differentiated and evaluated as `op`, so that no other transformation has to know it. Only jlora's interpreter reads the
plain function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora import _compat
from jlora._compat import Primitive, ad, batching, mlir

TREAT_AS = "jlora_treat_as"


def treat_as(op: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a custom kernel a plain equivalent, so that a weight which goes into the kernel is adapted factored.

        matmul = jlora.extend.treat_as(pallas_matmul, jnp.matmul)

    Outside of jlora the result is `op`: the same values, the same gradients. In an adapted program

        matmul(x, W + update)  =  op(x, W) + plain(x, W + update) - plain(x, W)

    where only what depends on the update is computed of `plain`. Gradients are those of `op` for the base, and those of
    `plain` for the update. This needs a `plain` that is affine in the weight. If it is not, the weight is materialised
    and goes into `op`, which `adapt` reports as for any other use without a rule.

    Arguments:
        op: the kernel, a function of pytrees of arrays: a `pallas_call`, a `custom_vjp` function, an FFI call.
        plain: a function of the same arguments with results of the same shapes and dtypes, in terms of JAX's own
            operations.

    Returns:
        a function with the signature of `op`.

    Raises:
        TypeError: when it is called, if the results of `op` and `plain` have different structures, shapes or dtypes.
    """

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        if not any(map(_compat.is_tracer, leaves)):
            return op(*args, **kwargs)
        traced = [_trace(fun, structure, leaves) for fun in (op, plain)]
        (_, _, out), (_, _, plain_out) = traced
        if out != plain_out:
            raise TypeError(f"treat_as expects results of one type: op returns {out}, plain returns {plain_out}.")
        (op_jaxpr, op_consts, _), (plain_jaxpr, plain_consts, _) = traced
        split = len(op_consts)

        def run_op(*operands: Any) -> list[Any]:
            return _compat.evaluate(op_jaxpr, operands[:split], operands[split + len(plain_consts) :])

        def run_plain(*operands: Any) -> list[Any]:
            consts = operands[split : split + len(plain_consts)]
            return _compat.evaluate(plain_jaxpr, consts, operands[split + len(plain_consts) :])

        results = _bind(run_op, run_plain, [*op_consts, *plain_consts, *leaves])
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return call


def _trace(fun: Callable[..., Any], structure: Any, leaves: Sequence[Any]) -> tuple[Any, Sequence[Any], Any]:
    """The open jaxpr of a function of leaves, the values of its constants, and the types of its results."""

    def flat(*leaves: Any) -> Any:
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return fun(*args, **kwargs)

    jaxpr, out = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    types = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), out)
    return *_compat.open_jaxpr(jaxpr), types


def _bind(op: Callable[..., Any], plain: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
    """Binds the primitive for functions of the operands without constants of their own."""
    types = [jax.typeof(operand) for operand in operands]
    return treat_as_p.bind(*operands, op=jax.make_jaxpr(op)(*types), plain=jax.make_jaxpr(plain)(*types))


def _evaluate(*operands: Any, op: Any, plain: Any) -> list[Any]:
    return _compat.evaluate(*_compat.open_jaxpr(op), operands)


def _abstract(*_: Any, op: Any, plain: Any) -> list[Any]:
    return [_compat.aval(var) for var in _compat.open_jaxpr(op)[0].outvars]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, op: Any, plain: Any) -> tuple[list[Any], list[Any]]:
    active = [k for k, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def fun(*values: Any) -> list[Any]:
        operands = dict(enumerate(primals)) | dict(zip(active, values, strict=True))
        return _evaluate(*operands.values(), op=op, plain=plain)

    return jax.jvp(fun, [primals[k] for k in active], [tangents[k] for k in active])


def _batch(operands: Sequence[Any], axes: Sequence[Any], *, op: Any, plain: Any) -> tuple[list[Any], list[int]]:
    funs = (functools.partial(_compat.evaluate, *_compat.open_jaxpr(jaxpr)) for jaxpr in (op, plain))
    op_fun, plain_fun = (jax.vmap(lambda *values, fun=fun: fun(values), in_axes=tuple(axes)) for fun in funs)
    out = _bind(op_fun, plain_fun, operands)
    return out, [0] * len(out)


treat_as_p = Primitive(TREAT_AS)
treat_as_p.multiple_results = True
treat_as_p.def_impl(_evaluate)
treat_as_p.def_abstract_eval(_abstract)
ad.primitive_jvps[treat_as_p] = _jvp
batching.primitive_batchers[treat_as_p] = _batch
mlir.register_lowering(treat_as_p, mlir.lower_fun(_evaluate, multiple_results=True))
