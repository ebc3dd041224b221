"""What the FP4 operators compute, written as ONNX functions of standard operators.

`trt::TRT_FP4DynamicQuantize` has no kernel outside TensorRT and `DequantizeLinear` on FLOAT4E2M1 has none in
ONNX Runtime. A FunctionProto says what they mean, and every runtime that inlines functions can then run them.

The numbers are NVFP4's: blocks of 16 along the last axis, E2M1 values, one E4M3 scale a block, one global
scale a tensor. All arithmetic is FP32, in an order that numpy, torch and ONNX Runtime repeat bit for bit.
"""

from __future__ import annotations

from onnx import FunctionProto, TensorProto, parser

__all__ = [
    "ACTIVATION_PLACEHOLDER",
    "FP8_QUANTIZER",
    "MICROSOFT_DOMAIN",
    "QUANTIZER",
    "SIMULATION_DOMAIN",
    "TRT_DOMAIN",
    "WEIGHT_PLACEHOLDER",
    "fp4_dequantize",
    "fp4_dequantize_gather",
    "fp4_dynamic_quantize",
]

TRT_DOMAIN = "trt"
# A function cannot shadow a standard operator in the standard domain, hence a domain of our own.
SIMULATION_DOMAIN = "fp4trt.simulation"
MICROSOFT_DOMAIN = "com.microsoft"

QUANTIZER = "TRT_FP4DynamicQuantize"
FP8_QUANTIZER = "QuantizeLinear"
# What marks in a third-party graph what is to become FP4.
WEIGHT_PLACEHOLDER = "TRT_FP4QDQ"
ACTIVATION_PLACEHOLDER = "TRT_FP4DynamicQDQ"

FUNCTION_OPSET = 23

# A block whose scale is zero is divided by the largest float instead: that gives zeros which keep their sign,
# where masking the result would turn -0 into +0.
_QUANTIZE = """
<domain: "{domain}", opset_import: ["": {opset}]>
TRT_FP4DynamicQuantize <axis: int = -1, block_size: int = 16, scale_type: int = 17>
(x, scale) => (codes, block_scales)
{{
    values = Cast <to: int = 1> (x)
    global_scale = Cast <to: int = 1> (scale)
    shape = Shape (values)
    leading = Shape <start: int = 0, end: int = -1> (values)
    minus_one = Constant <value_ints: ints = [-1]> ()
    block_length = Constant <value_int: int = @block_size> ()
    last = Reshape (block_length, minus_one)
    blocked_shape = Concat <axis: int = 0> (leading, minus_one, last)
    blocks = Reshape (values, blocked_shape)

    magnitudes = Abs (blocks)
    amax = ReduceMax <keepdims: int = 1> (magnitudes, minus_one)
    six = Constant <value_float: float = 6.0> ()
    e4m3_max = Constant <value_float: float = 448.0> ()
    largest_value = Mul (six, global_scale)
    exact_scale = Div (amax, largest_value)
    clamped_scale = Min (exact_scale, e4m3_max)
    scale_row = Squeeze (clamped_scale, minus_one)
    block_scales = Cast <to: int = 17> (scale_row)

    rounded_row = Cast <to: int = 1> (block_scales)
    rounded_scale = Unsqueeze (rounded_row, minus_one)
    step_of_one = Mul (rounded_scale, global_scale)
    zero = Constant <value_float: float = 0.0> ()
    huge = Constant <value_float: float = 3.4028234663852886e+38> ()
    is_zero = Equal (step_of_one, zero)
    divisor = Where (is_zero, huge, step_of_one)
    scaled = Div (blocks, divisor)

    minus_six = Constant <value_float: float = -6.0> ()
    clipped = Clip (scaled, minus_six, six)
    size = Abs (clipped)
    two = Constant <value_float: float = 2.0> ()
    four = Constant <value_float: float = 4.0> ()
    half = Constant <value_float: float = 0.5> ()
    one = Constant <value_float: float = 1.0> ()
    below_two = Less (size, two)
    below_four = Less (size, four)
    upper_step = Where (below_four, one, two)
    step = Where (below_two, half, upper_step)
    in_steps = Div (clipped, step)
    whole_steps = Round (in_steps)
    rounded = Mul (whole_steps, step)
    flat = Reshape (rounded, shape)
    codes = Cast <to: int = {codes_type}> (flat)
}}
"""

_DEQUANTIZE = """
<domain: "{domain}", opset_import: ["": {opset}]>
FP4Dequantize <block_size: int = 16, output_dtype: int = 1> (codes, scales) => (y)
{{
    values = Cast <to: int = 1> (codes)
    shape = Shape (values)
    leading = Shape <start: int = 0, end: int = -1> (values)
    minus_one = Constant <value_ints: ints = [-1]> ()
    block_length = Constant <value_int: int = @block_size> ()
    last = Reshape (block_length, minus_one)
    blocked_shape = Concat <axis: int = 0> (leading, minus_one, last)
    blocks = Reshape (values, blocked_shape)
    scale_values = Cast <to: int = 1> (scales)
    scale_column = Unsqueeze (scale_values, minus_one)
    products = Mul (blocks, scale_column)
    exact = Reshape (products, shape)
    y = Cast <to: int = @output_dtype> (exact)
}}
"""

_GATHER = """
<domain: "{domain}", opset_import: ["": {opset}, "com.microsoft": 1]>
FP4WeightDequantize <block_size: int = 16, output_dtype: int = 1> (codes, scales) => (y)
{{
    scale_values = Cast <to: int = 1> (scales)
    row_count = Shape <start: int = 0, end: int = 1> (scale_values)
    count = Squeeze (row_count)
    first = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    rows = Range (first, count, one)
    exact = com.microsoft.GatherBlockQuantized <gather_axis: int = 0, quantize_axis: int = 1, bits: int = 4,
                                                block_size: int = @block_size> (codes, rows, scale_values)
    y = Cast <to: int = @output_dtype> (exact)
}}
"""


def _parse(text: str, domain: str, **values: int) -> FunctionProto:
    return parser.parse_function(text.format(domain=domain, opset=FUNCTION_OPSET, **values))


def fp4_dynamic_quantize(codes_type: int = TensorProto.FLOAT4E2M1) -> FunctionProto:
    """Return `trt::TRT_FP4DynamicQuantize (x, scale) -> (codes, block_scales)`.

    `x` [..., K] is FP32, FP16 or BF16 and `scale` [] an FP32 or BF16 global scale, amax / (6 * 448): both are
    read exactly and all arithmetic is FP32, so one text serves every combination. `codes` [..., K] hold E2M1
    values, `block_scales` [..., K / 16] are FLOAT8E4M3FN. K must be a multiple of 16, `x` finite, `scale`
    above zero.

    Args:
        codes_type: FLOAT4E2M1 as TensorRT gives it, or FLOAT8E4M3FN (which holds every E2M1 value, and -0)
            for ONNX Runtime, which cannot cast to FP4.
    """
    return _parse(_QUANTIZE, TRT_DOMAIN, codes_type=codes_type)


def fp4_dequantize() -> FunctionProto:
    """Return `FP4Dequantize (codes, scales) -> y` in the simulation domain, of standard operators only.

    What DequantizeLinear with axis -1 and `block_size` computes: `codes` [..., K] of FLOAT4E2M1 or
    FLOAT8E4M3FN, `scales` [..., K / block_size] of FP32 or BF16, `y` [..., K] the FP32 product, rounded once
    to `output_dtype`.
    """
    return _parse(_DEQUANTIZE, SIMULATION_DOMAIN)


def fp4_dequantize_gather() -> FunctionProto:
    """Return `FP4WeightDequantize (codes, scales) -> y` in the simulation domain, for ONNX Runtime.

    As :func:`fp4_dequantize` for FLOAT4E2M1 `codes` [N, K], through com.microsoft::GatherBlockQuantized: the
    only kernel that ONNX Runtime has for FP4. It gathers every row, so it is a plain dequantization.
    """
    return _parse(_GATHER, SIMULATION_DOMAIN)
