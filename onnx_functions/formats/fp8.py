"""FP8 in a graph: E4M3 codes under one FP32 scale, by the standard's own operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, NodeProto, TensorProto, helper
from onnx.reference.op_run import OpRun

from onnx_functions.formats import FloatArray, Raw, Round

__all__ = ["ERROR_LIMIT", "OPERATORS", "bytes_of", "dequantize", "functions", "quantizer_node", "stored"]

ERROR_LIMIT: Final = 0.05
"""Normal data give .027."""

OPERATORS: Final[tuple[type[OpRun], ...]] = ()


def functions() -> Sequence[FunctionProto]:
    """Return nothing: ONNX Runtime has the operators."""
    return []


def quantizer_node() -> NodeProto:
    """Return QuantizeLinear."""
    return helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN)


def bytes_of(outputs: Sequence[FloatArray]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Return the codes."""
    return (outputs[0].astype(ml_dtypes.float8_e4m3fn).view(np.uint8),)


def dequantize(quantized: Sequence[FloatArray], scale: np.float32, rounded: Round) -> FloatArray:  # noqa: ARG001
    """Return ``code * scale``."""
    return np.asarray(quantized[0] * scale, np.float32)


def stored(raw: Raw) -> tuple[tuple[FloatArray, ...], np.float32]:
    """Return the E4M3 values [N, K] and the scale of a weight."""
    return (raw("weight").astype(np.float32),), np.float32(raw("weight_scale").reshape(()))
