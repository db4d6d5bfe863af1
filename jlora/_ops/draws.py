"""Random numbers of a network with a key: dropout of its input, and what is drawn between its factors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jlora._ir.weight import TensorNetwork


def apply_dropout(x: jax.Array, labels: str, network: TensorNetwork) -> jax.Array:
    """Dropout of a network's input, with a mask of its own for every key of a stacked weight.

    Arguments:
        x: the activation.
        labels: one index for every axis of `x`.
        network: the network; without a key the activation is returned as it is.
    """
    if network.key is None or not network.rate:
        return x
    mask = _draw(network, labels, x.shape, lambda key, shape: jax.random.bernoulli(key, 1 - network.rate, shape))
    return jnp.where(mask, x / jnp.asarray(1 - network.rate, x.dtype), jnp.zeros_like(x))


def draw_latent(x: jax.Array, labels: str, network: TensorNetwork) -> tuple[jax.Array, str]:
    """A draw from the normal distribution whose mean and logarithm of the variance are along the latent axis.

    Arguments:
        x: the activation, multiplied by the factor that has that axis.
        labels: one index for every axis of `x`.
        network: the network, with a key.

    Returns:
        the activation without that axis, and its indices.
    """
    mean, log_variance = (jnp.take(x, half, axis=labels.index(network.latent)) for half in (0, 1))
    labels = labels.replace(network.latent, "")
    noise = _draw(network, labels, mean.shape, lambda key, shape: jax.random.normal(jax.random.fold_in(key, 1), shape))
    return mean + noise.astype(mean.dtype) * jnp.exp(log_variance / 2), labels


def refuse_latent(network: TensorNetwork, use: str) -> None:
    """Raises if a network draws what is between its factors, which only products do.

    Arguments:
        network: the network.
        use: of the weight, for the error.

    Raises:
        ValueError: if it does.
    """
    if network.latent:
        raise ValueError(
            f"The update of this weight is drawn for every row of a product, and the program uses the weight in {use}. "
            "Exclude the path, or call jlora.with_dropout on the other updates alone: without a key it is at its mean."
        )


def _draw(
    network: TensorNetwork, labels: str, shape: tuple[int, ...], draw: Callable[[jax.Array, tuple[int, ...]], jax.Array]
) -> jax.Array:
    """Random numbers for an activation, drawn with the key of each layer of a stacked weight: `draw(key, shape)`."""
    assert network.key is not None
    key, term = network.key, network.key_term
    for name in [c for c in term if c not in labels]:  # the input lacks this axis, so one key is enough
        key, term = jnp.take(key, 0, axis=term.index(name)), term.replace(name, "")
    keyed = [labels.index(c) for c in term]
    rest = [k for k in range(len(shape)) if k not in keyed]
    own_shape = tuple(shape[k] for k in rest)
    signature = f"()->({','.join(f'd{k}' for k in range(len(rest)))})"
    drawn = jnp.vectorize(lambda key: draw(key, own_shape), signature=signature)(key)
    return drawn.transpose([(*keyed, *rest).index(k) for k in range(len(shape))])
