"""Kernels, FLOPs and collectives of programs for GPUs, from texts as XLA's compiler for GPUs writes them."""

import pytest

from jlora._plan.cost import Collective, cost
from jlora._plan.hlo import parse
from jlora._plan.kernels import Kernels, kernels

GEMM = (
    '"gemm_backend_config":{"alpha_real":1,"beta":BETA,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"EPILOGUE"}'
)


def gemm(beta=0, epilogue="DEFAULT"):
    return GEMM.replace("BETA", str(beta)).replace("EPILOGUE", epilogue)


# relu(x @ w + (x @ a) @ b) by cuBLAS: the second product adds to the first and applies the function.
CUBLAS = f"""HloModule jit_f, is_scheduled=true

ENTRY %main.0 (x: bf16[64,32], w: bf16[32,48], z: bf16[64,4], b: bf16[4,48]) -> bf16[64,48] {{
  %x = bf16[64,32]{{1,0}} parameter(0)
  %w = bf16[32,48]{{1,0}} parameter(1)
  %z = bf16[64,4]{{1,0}} parameter(2)
  %b = bf16[4,48]{{1,0}} parameter(3)
  %custom-call.2 = (bf16[64,48]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={{{gemm()}}}
  %get-tuple-element.2 = bf16[64,48]{{1,0}} get-tuple-element(%custom-call.2), index=0
  %cublas-lt-matmul.3 = (bf16[64,48]{{1,0}}, s8[33554432]{{0}}) custom-call(%z, %b, %get-tuple-element.2), custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{{{0}}: (2, {{}})}}, backend_config={{{gemm(1, "RELU")}}}
  ROOT %get-tuple-element.3 = bf16[64,48]{{1,0}} get-tuple-element(%cublas-lt-matmul.3), index=0
}}
"""  # noqa: E501


def test_products_of_cublas():
    program = parse(CUBLAS)
    assert cost(program).flops == 2 * 64 * 48 * (32 + 4)
    out = 64 * 48 * 2
    read = 2 * (64 * 32 + 32 * 48) + 2 * (64 * 4 + 4 * 48) + out  # beta reads the other result
    assert kernels(program) == Kernels(2, 2, 1, bytes_moved=read + 2 * out, float32_bytes=0, largest_bytes=out)


@pytest.mark.parametrize(("beta", "epilogue", "fused"), [(0, "DEFAULT", 0), (1, "DEFAULT", 1), (0, "BIAS", 1)])
def test_epilogues_of_cublas(beta, epilogue, fused):
    text = CUBLAS.replace(gemm(1, "RELU"), gemm(beta, epilogue))
    assert kernels(parse(text)).fused_products == fused


# A batch of products: the axes of the batch are in the result.
BATCH = """HloModule jit_f, is_scheduled=true

ENTRY %main.0 (x: bf16[8,256,128], w: bf16[8,128,64]) -> bf16[8,256,64] {
  %x.1 = bf16[8,256,128]{2,1,0} parameter(0)
  %w.1 = bf16[8,128,64]{2,1,0} parameter(1)
  %custom-call.1 = (bf16[8,256,64]{2,1,0}, s8[33554432]{0}) custom-call(%x.1, %w.1), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"alpha_real":2,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]},"epilogue":"DEFAULT"}}
  ROOT %get-tuple-element.1 = bf16[8,256,64]{2,1,0} get-tuple-element(%custom-call.1), index=0
}
"""  # noqa: E501


def test_batches_of_cublas():
    assert cost(parse(BATCH)).flops == 2 * 8 * 256 * 128 * 64


# A convolution of a 33 x 33 input, kernels of 3 x 3 and stride 2, and its two gradients: all multiply as often.
CUDNN = """HloModule jit_f, is_scheduled=true

ENTRY %main.0 (x: bf16[8,33,33,64], w: bf16[128,3,3,64], g: bf16[8,16,16,128]) -> bf16[8,16,16,128] {
  %x = bf16[8,33,33,64]{3,2,1,0} parameter(0)
  %w = bf16[128,3,3,64]{3,2,1,0} parameter(1)
  %g = bf16[8,16,16,128]{3,2,1,0} parameter(2)
  %cudnn-conv = CALL, window={size=3x3 stride=2x2}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$TARGET", backend_config={"cudnn_conv_backend_config":{"activation_mode":"kNone"}}
  ROOT %get-tuple-element = bf16[8,16,16,128]{3,2,1,0} get-tuple-element(%cudnn-conv), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("convForward", "(bf16[8,16,16,128]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w)"),
        ("convBackwardFilter", "(bf16[128,3,3,64]{3,2,1,0}, u8[0]{0}) custom-call(%x, %g)"),
        ("convBackwardInput", "(bf16[8,33,33,64]{3,2,1,0}, u8[0]{0}) custom-call(%g, %w)"),
    ],
)
def test_convolutions_of_cudnn(target, call):
    program = parse(CUDNN.replace("CALL", call).replace("TARGET", target))
    assert cost(program).flops == 2 * 8 * 16 * 16 * 128 * 3 * 3 * 64
    assert kernels(program).products == 1


# Two of three layers' kernels are multiplied in a loop. Each turn slices its kernel out of the stack, multiplies (by
# Triton), adds, and writes the result into a stack; two arrays are reduced together, and one is gathered.
LOOP = """HloModule jit_run, is_scheduled=true

%gemm_fusion_computation (parameter_0: bf16[64,32], parameter_1: bf16[3,32,32], parameter_2: s32[]) -> bf16[64,32] {
  %parameter_0 = bf16[64,32]{1,0} parameter(0)
  %parameter_1 = bf16[3,32,32]{2,1,0} parameter(1)
  %parameter_2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %dynamic-slice.1 = bf16[1,32,32]{2,1,0} dynamic-slice(%parameter_1, %parameter_2, %zero, %zero), dynamic_slice_sizes={1,32,32}
  %bitcast.1 = bf16[32,32]{1,0} bitcast(%dynamic-slice.1)
  ROOT %dot.1 = bf16[64,32]{1,0} dot(%parameter_0, %bitcast.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_update (param_0: f32[3,64,32], param_1: bf16[64,32], param_2: s32[]) -> f32[3,64,32] {
  %param_0 = f32[3,64,32]{2,1,0} parameter(0)
  %param_1 = bf16[64,32]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %convert.1 = f32[64,32]{1,0} convert(%param_1)
  %bitcast.2 = f32[1,64,32]{2,1,0} bitcast(%convert.1)
  %zero.1 = s32[] constant(0)
  ROOT %dynamic-update-slice.1 = f32[3,64,32]{2,1,0} dynamic-update-slice(%param_0, %bitcast.2, %param_2, %zero.1, %zero.1)
}

%fused_add (param_0.1: s32[]) -> s32[] {
  %param_0.1 = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %add.1 = s32[] add(%param_0.1, %one)
}

%sum (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add.2 = bf16[] add(%a, %b)
}

%body (state: (s32[], bf16[64,32], bf16[3,32,32], f32[3,64,32])) -> (s32[], bf16[64,32], bf16[3,32,32], f32[3,64,32]) {
  %state = (s32[], bf16[64,32]{1,0}, bf16[3,32,32]{2,1,0}, f32[3,64,32]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[3,32,32]{2,1,0} get-tuple-element(%state), index=2
  %stack = f32[3,64,32]{2,1,0} get-tuple-element(%state), index=3
  %gemm_fusion = bf16[64,32]{1,0} fusion(%x, %w, %i), kind=kCustom, calls=%gemm_fusion_computation, backend_config={"fusion_backend_config":{"kind":"__triton_nested_gemm_fusion"}}
  %loop_update = f32[3,64,32]{2,1,0} fusion(%stack, %gemm_fusion, %i), kind=kLoop, calls=%fused_update
  %next = s32[] fusion(%i), kind=kLoop, calls=%fused_add
  %reduce-scatter-start.1 = ((bf16[64,32]{1,0}, bf16[64,4]{1,0}), (bf16[32,32]{1,0}, bf16[32,4]{1,0})) reduce-scatter-start(%gemm_fusion, %small), channel_id=1, dimensions={0}, to_apply=%sum
  %small = bf16[64,4]{1,0} constant({...})
  %reduce-scatter-done.1 = (bf16[32,32]{1,0}, bf16[32,4]{1,0}) reduce-scatter-done(%reduce-scatter-start.1)
  %half = bf16[32,32]{1,0} get-tuple-element(%reduce-scatter-done.1), index=0
  %all-gather-start.1 = (bf16[32,32]{1,0}, bf16[64,32]{1,0}) all-gather-start(%half), channel_id=2, dimensions={0}
  %all-gather-done.1 = bf16[64,32]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %tuple = (s32[], bf16[64,32]{1,0}, bf16[3,32,32]{2,1,0}, f32[3,64,32]{2,1,0}) tuple(%next, %all-gather-done.1, %w, %loop_update)
}

%test (state.1: (s32[], bf16[64,32], bf16[3,32,32], f32[3,64,32])) -> pred[] {
  %state.1 = (s32[], bf16[64,32]{1,0}, bf16[3,32,32]{2,1,0}, f32[3,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %three = s32[] constant(3)
  ROOT %compare = pred[] compare(%i.1, %three), direction=LT
}

ENTRY %main.0_spmd (x.2: bf16[64,32], w.2: bf16[3,32,32], stack.2: f32[3,64,32]) -> f32[3,64,32] {
  %x.2 = bf16[64,32]{1,0} parameter(0)
  %w.2 = bf16[3,32,32]{2,1,0} parameter(1)
  %stack.2 = f32[3,64,32]{2,1,0} parameter(2)
  %zero.2 = s32[] constant(0)
  %copy = s32[] copy(%zero.2)
  %tuple.1 = (s32[], bf16[64,32]{1,0}, bf16[3,32,32]{2,1,0}, f32[3,64,32]{2,1,0}) tuple(%copy, %x.2, %w.2, %stack.2)
  %while = (s32[], bf16[64,32]{1,0}, bf16[3,32,32]{2,1,0}, f32[3,64,32]{2,1,0}) while(%tuple.1), condition=%test, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[3,64,32]{2,1,0} get-tuple-element(%while), index=3
}
"""  # noqa: E501


def test_a_loop():
    program = parse(LOOP)
    assert cost(program).flops == 3 * 2 * 64 * 32 * 32
    assert (
        cost(program).collectives
        == (
            Collective("all-gather", "bf16[64,32]", 64 * 32 * 2, 3, True),
            Collective("reduce-scatter", "bf16[64,32] + bf16[64,4]", 64 * (32 + 4) * 2, 3, True),
        )[::-1]
    )


def test_kernels_of_a_loop():
    """Of a stack a turn reads one slice and writes one; the condition's comparison is a kernel too."""
    product = 64 * 32 * 2 + 32 * 32 * 2 + 4 + 64 * 32 * 2
    update = 64 * 32 * 2 + 4 + 64 * 32 * 4
    counter, test = 4 + 4, 4 + 4 + 1
    assert kernels(parse(LOOP)) == Kernels(
        count=1 + 3 * 4,
        products=3,
        fused_products=0,
        bytes_moved=4 + 4 + 3 * (product + update + counter + test),
        float32_bytes=3 * 64 * 32 * 4,
        largest_bytes=64 * 32 * 4,
        wide={"32x64": 3},  # the float32 copy of the product's result
    )


def test_what_follows_a_product_in_its_kernel():
    """A conversion of the result is no other work, an addition is."""
    root = "ROOT %dot.1 = bf16[64,32]{1,0} dot"
    converted = "%dot.1 = f32[64,32]{1,0} dot", "\n  ROOT %convert.9 = bf16[64,32]{1,0} convert(%dot.1)"
    added = "%dot.1 = bf16[64,32]{1,0} dot", "\n  ROOT %add.9 = bf16[64,32]{1,0} add(%dot.1, %parameter_0)"
    fused = []
    for start, end in (converted, added):
        line = next(each for each in LOOP.splitlines() if root in each)
        fused.append(kernels(parse(LOOP.replace(line, line.replace(root, start) + end))).fused_products)
    assert fused == [0, 3]
