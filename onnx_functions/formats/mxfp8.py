"""MXFP8 in a graph: E4M3 codes, an E8M0 scale for each block of 32, by TensorRT's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, NodeProto, helper, parser
from onnx.reference.op_run import OpRun

from onnx_functions.formats import FloatArray, Raw, Round
from onnx_functions.library import FUNCTION_OPSET

__all__ = ["ERROR_LIMIT", "OPERATORS", "bytes_of", "dequantize", "functions", "quantizer_node", "stored"]

ERROR_LIMIT: Final = 0.05
"""Normal data give .026."""

_BLOCK: Final = 32
_POWERS: Final = np.ldexp(1.0, np.arange(-127, 128)).astype(np.float32)
"""FP32 value of scales 0..254."""

_BLOCKS: Final = """
    shape = Shape (values)
    leading = Shape <start: int = 0, end: int = -1> (values)
    minus_one = Constant <value_ints: ints = [-1]> ()
    block_length = Constant <value_int: int = @block_size> ()
    last = Reshape (block_length, minus_one)
    blocked_shape = Concat <axis: int = 0> (leading, minus_one, last)
    blocks = Reshape (values, blocked_shape)
    powers = Constant <value_floats: floats = [{powers}]> ()
    one = Constant <value_int: int = 1> ()
    zero = Constant <value_int: int = 0> ()
    largest = Constant <value_int: int = 254> ()
"""

# The logarithm may be off by its last place: the exponent is then one too small or too large, which two comparisons
# with powers of two, exact ones, put right.
_QUANTIZE: Final = """
<domain: "trt", opset_import: ["": {opset}]>
TRT_MXFP8DynamicQuantize <axis: int = -1, block_size: int = 32, output_dtype: int = 17> (x) => (codes, scales)
{{
    values = Cast <to: int = 1> (x)
    {blocks}
    magnitudes = Abs (blocks)
    amax = ReduceMax <keepdims: int = 1> (magnitudes, minus_one)
    e4m3_max = Constant <value_float: float = 448.0> ()
    quotient = Div (amax, e4m3_max)
    logarithm = Log (quotient)
    to_base_two = Constant <value_float: float = 1.44269504> ()
    exponent = Mul (logarithm, to_base_two)
    whole = Ceil (exponent)
    bias = Constant <value_float: float = 127.0> ()
    biased = Add (whole, bias)
    float_zero = Constant <value_float: float = 0.0> ()
    float_largest = Constant <value_float: float = 254.0> ()
    near = Clip (biased, float_zero, float_largest)
    guess = Cast <to: int = 7> (near)
    lower_index = Sub (guess, one)
    lower_kept = Max (lower_index, zero)
    lower = Gather (powers, lower_kept)
    fits_lower = LessOrEqual (quotient, lower)
    lowered = Where (fits_lower, lower_kept, guess)
    power = Gather (powers, lowered)
    beyond = Greater (quotient, power)
    higher_index = Add (lowered, one)
    higher = Min (higher_index, largest)
    scale = Where (beyond, higher, lowered)
    inverse_index = Sub (largest, scale)
    inverse = Gather (powers, inverse_index)
    scaled = Mul (blocks, inverse)
    e4m3_min = Constant <value_float: float = -448.0> ()
    clipped = Clip (scaled, e4m3_min, e4m3_max)
    flat = Reshape (clipped, shape)
    codes = Cast <to: int = 17> (flat)
    scale_row = Squeeze (scale, minus_one)
    scales = Cast <to: int = 2> (scale_row)
}}
"""

_DEQUANTIZE: Final = """
<domain: "trt", opset_import: ["": {opset}]>
TRT_MXFP8DequantizeLinear <axis: int = -1, block_size: int = 32, output_dtype: int = 1> (codes, scales) => (y)
{{
    values = Cast <to: int = 1> (codes)
    {blocks}
    index = Cast <to: int = 7> (scales)
    steps = Gather (powers, index)
    column = Unsqueeze (steps, minus_one)
    products = Mul (blocks, column)
    exact = Reshape (products, shape)
    y = Cast <to: int = @output_dtype> (exact)
}}
"""


def functions() -> Sequence[FunctionProto]:
    """Return both operators, which ONNX Runtime has no kernel for."""
    blocks = _BLOCKS.format(powers=", ".join(repr(float(power)) for power in _POWERS))
    return [
        parser.parse_function(text.format(opset=FUNCTION_OPSET, blocks=blocks)) for text in (_QUANTIZE, _DEQUANTIZE)
    ]


def quantizer_node() -> NodeProto:
    """Return `trt::TRT_MXFP8DynamicQuantize`."""
    return helper.make_node("TRT_MXFP8DynamicQuantize", ["x"], ["q", "s"], domain="trt", axis=-1, block_size=_BLOCK)


def bytes_of(outputs: Sequence[FloatArray]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Return codes and block scales."""
    return outputs[0].astype(ml_dtypes.float8_e4m3fn).view(np.uint8), outputs[1].astype(np.uint8)


def dequantize(quantized: Sequence[FloatArray], scale: np.float32, rounded: Round) -> FloatArray:  # noqa: ARG001
    """Return ``code * 2^(block scale - 127)``."""
    codes, scales = quantized
    return np.asarray(codes * np.repeat(_POWERS[scales.astype(np.int64)], _BLOCK, -1), np.float32)


def stored(raw: Raw) -> tuple[tuple[FloatArray, ...], np.float32]:
    """Return the E4M3 values and block scales of a weight, and 1."""
    return (raw("weight").astype(np.float32), raw("weight_scale").astype(np.float32)), np.float32(1)


class TRT_MXFP8DynamicQuantize(OpRun):  # noqa: N801 - onnx finds the operator by its class name
    """`trt::TRT_MXFP8DynamicQuantize (x) -> (codes, scales)` for the ReferenceEvaluator."""

    op_domain = "trt"

    def _run(
        self, x: npt.NDArray[Any], axis: int = -1, block_size: int = 32, output_dtype: int = 17
    ) -> tuple[Any, Any]:
        _require(axis in (-1, x.ndim - 1), block_size, output_dtype == 17)
        blocks = x.astype(np.float32).reshape(*x.shape[:-1], -1, _BLOCK)
        mantissa, exponent = np.frexp(np.abs(blocks).max(-1) / np.float32(448))
        scales = np.where(mantissa == 0, 0, np.clip(exponent - (mantissa == 0.5) + 127, 0, 254)).astype(np.uint8)
        codes = np.clip(blocks / _POWERS[scales][..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes.reshape(x.shape), scales


class TRT_MXFP8DequantizeLinear(OpRun):  # noqa: N801 - likewise
    """`trt::TRT_MXFP8DequantizeLinear (codes, scales) -> y` for the ReferenceEvaluator."""

    op_domain = "trt"

    def _run(
        self,
        codes: npt.NDArray[Any],
        scales: npt.NDArray[Any],
        axis: int = -1,
        block_size: int = 32,
        output_dtype: int = 16,
    ) -> tuple[Any]:
        _require(axis in (-1, codes.ndim - 1), block_size, output_dtype in (1, 10, 16))
        values = dequantize((codes.astype(np.float32), scales.astype(np.float32)), np.float32(1), lambda d: d)
        return (values.astype(helper.tensor_dtype_to_np_dtype(output_dtype)),)


OPERATORS: Final = (TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear)


def _require(axis: bool, block_size: int, kind: bool) -> None:
    if not (axis and block_size == _BLOCK and kind):
        raise ValueError(f"an operator of MXFP8 along another axis, in blocks of {block_size}, or of another type")
