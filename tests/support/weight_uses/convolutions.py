"""Convolutions: rank, stride, dilation, grouping and layout."""

from __future__ import annotations

from typing import Any

from jax import lax

from tests.support.weight_uses.kind import Array, Params, kind

_NHWC = ("NHWC", "HWIO", "NHWC")


def _conv(x: Array, w: Array, layout: tuple[str, str, str], **options: Any) -> Array:
    options = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)


@kind((5, 3, 3), x=(2, 3, 8))
def conv_1d(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NCW", "OIW", "NCW"), window_strides=(2,), rhs_dilation=(2,), padding="VALID")


@kind((2, 3, 3, 6), x=(2, 4, 5, 3))
def conv_2d(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], _NHWC, window_strides=(2, 1), padding=((1, 0), (2, 1)))


@kind((3, 2, 6, 3), x=(4, 5, 2, 3))
def conv_2d_of_a_dilated_input(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("HWNC", "IHOW", "CNHW"), lhs_dilation=(2, 1), padding=((1, 1), (0, 2)))


@kind((2, 4, 6), x=(2, 5, 4))
def conv_of_composite_channels(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NWC", "WIO", "NWC"))


@kind((2, 3, 2, 3, 4), x=(1, 5, 4, 3, 3))
def conv_3d(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NDHWC", "DHWIO", "NDHWC"), window_strides=(1, 2, 1))


@kind((2, 3, 2, 6), x=(2, 4, 5, 4))
def conv_grouped(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], _NHWC, feature_group_count=2)


@kind((2, 3, 1, 3), x=(2, 4, 5, 3))
def conv_depthwise(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], _NHWC, feature_group_count=3)


@kind((6, 1, 4), x=(2, 3, 7))
def conv_depthwise_wide(p: Params, x: Array) -> Array:
    return _conv(x, p["w"], ("NCW", "OIW", "NCW"), feature_group_count=3, window_strides=(2,))


@kind((2, 3, 3, 6), x=(2, 3, 4, 3))
def conv_transpose(p: Params, x: Array) -> Array:
    return lax.conv_transpose(x, p["w"], (2, 2), "SAME", dimension_numbers=_NHWC)


@kind((2, 3, 6, 3), x=(2, 3, 4, 3))
def conv_transpose_kernel(p: Params, x: Array) -> Array:
    return lax.conv_transpose(x, p["w"], (2, 1), "VALID", dimension_numbers=_NHWC, transpose_kernel=True)
