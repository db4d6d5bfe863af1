"""Layers of convolutions."""

from __future__ import annotations

import equinox as eqx
import flax.linen as nn
import jax
from flax import nnx

from tests.support.third_party.case import (
    BATCH,
    TIME,
    Case,
    linen,
    numbers,
    of_eqx,
    of_nnx,
)


def linen_conv() -> Case:
    module = nn.Conv(6, (3, 2), strides=(2, 1), kernel_dilation=(1, 2), feature_group_count=2, padding="CIRCULAR")
    return linen(module, numbers(BATCH, 9, 7, 4), paths={"kernel"})


def linen_conv_one_dimensional() -> Case:
    return linen(nn.Conv(6, 3, padding="CAUSAL"), numbers(BATCH, TIME, 4), paths={"kernel"})


def linen_conv_depthwise() -> Case:
    return linen(nn.Conv(8, (3, 3), feature_group_count=4), numbers(BATCH, 6, 5, 4), paths={"kernel"})


def linen_conv_transpose() -> Case:
    module = nn.ConvTranspose(6, (3, 2), strides=(2, 2))
    return linen(module, numbers(BATCH, 4, 3, 5), paths={"kernel"})


def linen_conv_transpose_of_a_kernel() -> Case:
    """`transpose_kernel=True` takes the kernel of the convolution that it transposes, reversed and turned."""
    module = nn.ConvTranspose(6, (3, 2), strides=(2, 2), transpose_kernel=True)
    return linen(module, numbers(BATCH, 4, 3, 5), paths={"kernel"})


def nnx_conv() -> Case:
    return of_nnx(nnx.Conv(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0)), numbers(BATCH, 7, 6, 4), paths={"kernel"})


def nnx_conv_transpose() -> Case:
    module = nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), rngs=nnx.Rngs(0))
    return of_nnx(module, numbers(BATCH, 4, 3, 4), paths={"kernel"})


def equinox_conv() -> Case:
    module = eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, 4, 7, 6), paths={"weight"})


def equinox_conv_transpose() -> Case:
    module = eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, key=jax.random.key(0))
    return of_eqx(module, numbers(BATCH, 4, 4, 3), paths={"weight"})


CASES = [
    linen_conv,
    linen_conv_one_dimensional,
    linen_conv_depthwise,
    linen_conv_transpose,
    linen_conv_transpose_of_a_kernel,
    nnx_conv,
    nnx_conv_transpose,
    equinox_conv,
    equinox_conv_transpose,
]
