"""FLOPs and collectives, read from the text of a compiled program."""

import pytest

from jlora._plan.cost import cost
from jlora._plan.hlo import parse
from jlora._plan.products import convolution_taps

# A loop's length as HLO says it, and as the TPU's leaves it to be read from the counter; an all-gather that the TPU
# spreads over two computations; and what a start's result holds besides.
HLO = """HloModule m

%done (p: f32[2,8]) -> f32[4,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %g.2 = f32[4,8]{1,0} all-gather(%p), channel_id=3, dimensions={0}
}

%body (c: (s32[], f32[2,8], f32[8,8])) -> (s32[], f32[2,8], f32[8,8]) {
  %c = (s32[], f32[2,8], /*index=2*/f32[8,8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %x = f32[2,8]{1,0:T(8,128)} get-tuple-element(%c), index=1
  %w = f32[8,8]{1,0} get-tuple-element(%c), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %g.1 = f32[4,8]{1,0} all-gather(%x), channel_id=3, dimensions={0}
  %f = f32[4,8]{1,0} fusion(%x), kind=kCustom, calls=%done
  %y = f32[2,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %s = (f32[2,8]{1,0}, f32[2,8]{1,0}, u32[], u32[]) collective-permute-start(%y), channel_id=4
  %z = f32[2,8]{1,0} collective-permute-done(%s)
  ROOT %t = (s32[], f32[2,8], f32[8,8]) tuple(%next, %z, %w)
}

%test (c: (s32[], f32[2,8], f32[8,8])) -> pred[] {
  %c = (s32[], f32[2,8], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(11)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[2,8], w: f32[8,8]) -> f32[2,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %one = s32[] constant(1)
  %copy = s32[] copy(%one)
  %t = (s32[], f32[2,8], f32[8,8]) tuple(%copy, %x, %w)
  %loop = (s32[], f32[2,8], f32[8,8]) while(%t), condition=%test, body=%bodySAID
  ROOT %out = f32[2,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.mark.parametrize(
    ("change", "turns", "exact"),
    [
        (("SAID", ""), 5, True),
        (("SAID", ', backend_config={"known_trip_count":{"n":"7"}}'), 7, True),
        (("direction=LT", "direction=NE"), 1, False),
        (("constant(2)", "iota()"), 1, False),
    ],
)
def test_hlo(change, turns, exact):
    work = cost(parse(HLO.replace(*change).replace("SAID", "")))
    assert (work.flops, work.exact) == (turns * 2 * 2 * 8 * 8, exact)
    assert [(c.kind, c.shape, c.bytes, c.count, c.exact) for c in work.collectives] == [
        ("all-gather", "f32[4,8]", 4 * 8 * 4, turns, exact),
        ("collective-permute", "f32[2,8]", 2 * 8 * 4, turns, exact),
    ]


# The batch of a product is a spatial axis to the TPU: dilated or padded so that each place sees one number.
@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "multiplications"),
    [
        ((4, 16), (16, 8), (4, 8), "dim_labels=bf_io->bf", 4 * 16 * 8),
        ((2, 4, 16), (2, 16, 8), (2, 4, 8), "window={size=2 lhs_dilate=2}, dim_labels=0bf_0io->0bf", 2 * 4 * 16 * 8),
        (
            (2, 4, 16),
            (2, 16, 8),
            (2, 4, 8),
            "window={size=2 stride=2 pad=1_1 rhs_reversal=1}, dim_labels=0bf_0io->0bf",
            2 * 4 * 16 * 8,
        ),
        ((1, 5, 3), (3, 3, 2), (1, 5, 2), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", (2 + 3 * 3 + 2) * 3 * 2),
    ],
)
def test_convolutions(left, right, out, rest, multiplications):
    assert convolution_taps(rest, left, right, out) == multiplications
