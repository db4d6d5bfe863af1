"""Which weights a program for GPUs dequantises, from texts as XLA's compiler for GPUs writes them."""

import pytest

from jlora._plan.dequantised import Dequantised, dequantised
from jlora._plan.hlo import parse

# Three layers, each with two kernels of 32 x 32 as codes of two numbers a byte. BODY multiplies by them.
TEXT = """HloModule jit_run, is_scheduled=true

%decode (codes: u8[16,32]) -> bf16[32,32] {
  %codes = u8[16,32]{1,0} parameter(0)
  %high = u8[16,32]{1,0} convert(%codes)
  %both = u8[32,32]{1,0} concatenate(%codes, %high), dimensions={0}
  ROOT %values = bf16[32,32]{1,0} convert(%both)
}

%product (x: bf16[64,32], w: bf16[32,32]) -> bf16[64,32] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[32,32]{1,0} parameter(1)
  ROOT %dot = bf16[64,32]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%decode_and_product (x.1: bf16[64,32], codes.1: u8[16,32]) -> bf16[64,32] {
  %x.1 = bf16[64,32]{1,0} parameter(0)
  %codes.1 = u8[16,32]{1,0} parameter(1)
  %both.1 = u8[32,32]{1,0} concatenate(%codes.1, %codes.1), dimensions={0}
  %values.1 = bf16[32,32]{1,0} convert(%both.1)
  ROOT %dot.1 = bf16[64,32]{1,0} dot(%x.1, %values.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], bf16[64,32], u8[3,16,32], u8[3,16,32])) -> (s32[], bf16[64,32], u8[3,16,32], u8[3,16,32]) {
  %state = (s32[], bf16[64,32]{1,0}, u8[3,16,32]{2,1,0}, u8[3,16,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %y = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %first = u8[3,16,32]{2,1,0} get-tuple-element(%state), index=2
  %second = u8[3,16,32]{2,1,0} get-tuple-element(%state), index=3
  %zero = s32[] constant(0)
  %slice = u8[1,16,32]{2,1,0} dynamic-slice(%first, %i, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %codes.2 = u8[16,32]{1,0} bitcast(%slice)
  %slice.2 = u8[1,16,32]{2,1,0} dynamic-slice(%second, %i, %zero, %zero), dynamic_slice_sizes={1,16,32}
  %codes.3 = u8[16,32]{1,0} bitcast(%slice.2)
BODY
}

%test (state.1: (s32[], bf16[64,32], u8[3,16,32], u8[3,16,32])) -> pred[] {
  %state.1 = (s32[], bf16[64,32]{1,0}, u8[3,16,32]{2,1,0}, u8[3,16,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %compare = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main.0 (x.2: bf16[64,32], first.2: u8[3,16,32], second.2: u8[3,16,32]) -> bf16[64,32] {
  %x.2 = bf16[64,32]{1,0} parameter(0)
  %first.2 = u8[3,16,32]{2,1,0} parameter(1)
  %second.2 = u8[3,16,32]{2,1,0} parameter(2)
  %zero.2 = s32[] constant(0)
  %tuple.1 = (s32[], bf16[64,32]{1,0}, u8[3,16,32]{2,1,0}, u8[3,16,32]{2,1,0}) tuple(%zero.2, %x.2, %first.2, %second.2)
  %while = (s32[], bf16[64,32]{1,0}, u8[3,16,32]{2,1,0}, u8[3,16,32]{2,1,0}) while(%tuple.1), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[64,32]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501

BF16 = "bf16[64,32]{1,0} fusion"
STATE = "ROOT %tuple = (s32[], bf16[64,32]{1,0}, u8[3,16,32]{2,1,0}, u8[3,16,32]{2,1,0}) tuple"
DECODE = "  %w.2 = bf16[32,32]{1,0} fusion(%codes.2), kind=kLoop, calls=%decode"
DECODE_SECOND = "  %w.3 = bf16[32,32]{1,0} fusion(%codes.3), kind=kLoop, calls=%decode"
PRODUCT = f"  %z = {BF16}(%y, %w.2), kind=kCustom, calls=%product"
PRODUCT_SECOND = f"  %z.2 = {BF16}(%z, %w.3), kind=kCustom, calls=%product"
END = f"  {STATE}(%i, %z.2, %first, %second)"
KERNEL = 32 * 32 * 2

BODIES = {
    "one after another": ([DECODE, PRODUCT, DECODE_SECOND, PRODUCT_SECOND, END], Dequantised(6, KERNEL, 0)),
    "both at one time": ([DECODE, DECODE_SECOND, PRODUCT, PRODUCT_SECOND, END], Dequantised(6, 2 * KERNEL, 0)),
    "in the kernel of its product": (
        [
            f"  %z = {BF16}(%y, %codes.2), kind=kCustom, calls=%decode_and_product",
            f"  %z.2 = {BF16}(%z, %codes.3), kind=kCustom, calls=%decode_and_product",
            END,
        ],
        Dequantised(),
    ),
    "kept for the next iteration": (
        [DECODE, PRODUCT, DECODE_SECOND, PRODUCT_SECOND, END.replace("%second", "%w.3")],
        Dequantised(6, KERNEL, 3),
    ),
    # Beside the codes an activation passes through the barrier: what is computed from it is not dequantised.
    "codes behind a barrier": (
        [
            "  %pair = (u8[16,32]{1,0}, bf16[64,32]{1,0}) tuple(%codes.2, %y)",
            "  %barrier = (u8[16,32]{1,0}, bf16[64,32]{1,0}) optimization-barrier(%pair)",
            "  %codes.4 = u8[16,32]{1,0} get-tuple-element(%barrier), index=0",
            "  %y.2 = bf16[64,32]{1,0} get-tuple-element(%barrier), index=1",
            "  %y.3 = bf16[64,32]{1,0} negate(%y.2)",
            DECODE.replace("%codes.2", "%codes.4"),
            PRODUCT.replace("%y", "%y.3"),
            PRODUCT_SECOND.replace("%w.3", "%w.2"),
            END,
        ],
        Dequantised(3, KERNEL, 0),
    ),
    "gathered over devices": (
        [
            "  %half = bf16[16,32]{1,0} convert(%codes.2)",
            "  %start = (bf16[16,32]{1,0}, bf16[32,32]{1,0}) all-gather-start(%half), channel_id=1, dimensions={0}",
            "  %w.2 = bf16[32,32]{1,0} all-gather-done(%start)",
            PRODUCT,
            PRODUCT_SECOND.replace("%w.3", "%w.2"),
            END,
        ],
        Dequantised(6, KERNEL // 2 + KERNEL, 0),
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_is_dequantised(name: str):
    lines, expected = BODIES[name]
    assert dequantised(parse(TEXT.replace("BODY", "\n".join(lines)))) == expected
