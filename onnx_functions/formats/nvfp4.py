"""NVFP4 in a graph: E2M1 codes, an E4M3 scale for each block of 16, an FP32 global scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, NodeProto, TensorProto, helper
from onnx.reference.op_run import OpRun

from onnx_functions import library
from onnx_functions.formats import FloatArray, Raw, Round

__all__ = [
    "E2M1",
    "ERROR_LIMIT",
    "OPERATORS",
    "TRT_FP4DynamicQuantize",
    "bytes_of",
    "dequantize",
    "functions",
    "quantize_nvfp4",
    "quantizer_node",
    "stored",
]

ERROR_LIMIT: Final = 0.16
"""Normal data give .095, the widest layers of FLUX stay under .12."""

E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


_HUGE: Final = np.finfo(np.float32).max


def quantize_nvfp4(x: npt.NDArray[np.float32], scale: np.float32) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """Quantize FP32 `x` [..., K] with the FP32 global scale; K a multiple of 16.

    Returns:
        E2M1 values [..., K] as FP32 and block scales [..., K / 16] as float8_e4m3fn.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    # A scale of 0 gives what IEEE says, as in every other runtime; that such a scale is wrong is the gates' to say.
    with np.errstate(all="ignore"):
        wanted = np.minimum(np.abs(blocks).max(-1) / (np.float32(6) * scale), np.float32(448))
        block_scales = wanted.astype(ml_dtypes.float8_e4m3fn)
        d = (block_scales.astype(np.float32) * scale)[..., None]
        q = np.clip(blocks / np.where(d == 0, _HUGE, d), -6, 6).astype(np.float32)
    magnitude = np.abs(q)
    step = np.where(magnitude < 2, 0.5, np.where(magnitude < 4, 1.0, 2.0)).astype(np.float32)
    return (np.rint(q / step) * step).reshape(x.shape), block_scales


class TRT_FP4DynamicQuantize(OpRun):  # noqa: N801 - onnx finds the operator by its class name
    """`trt::TRT_FP4DynamicQuantize (x, scale) -> (codes, block_scales)` for the ReferenceEvaluator."""

    op_domain = "trt"

    def _run(
        self,
        x: npt.NDArray[Any],
        scale: npt.NDArray[Any],
        axis: int = -1,
        block_size: int = 16,
        scale_type: int = 17,
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        if axis not in (-1, x.ndim - 1) or block_size != 16 or scale_type != 17:
            raise ValueError(f"quantizer with axis {axis}, block_size {block_size}, scale_type {scale_type}")
        values, block_scales = quantize_nvfp4(x.astype(np.float32), np.float32(scale.reshape(())))
        return values.astype(ml_dtypes.float4_e2m1fn), block_scales


OPERATORS: Final = (TRT_FP4DynamicQuantize,)


def functions() -> Sequence[FunctionProto]:
    """Return what ONNX Runtime, which has no FP4, needs."""
    quantize_to_e4m3 = library.fp4_dynamic_quantize(TensorProto.FLOAT8E4M3FN)
    return [quantize_to_e4m3, library.fp4_dequantize(), library.fp4_dequantize_gather()]


def quantizer_node() -> NodeProto:
    """Return `trt::TRT_FP4DynamicQuantize`."""
    return helper.make_node(
        "TRT_FP4DynamicQuantize", ["x", "scale"], ["q", "s"], domain="trt", axis=-1, block_size=16, scale_type=17
    )


def bytes_of(outputs: Sequence[FloatArray]) -> tuple[npt.NDArray[np.uint8], ...]:
    """Return codes 0..15, one a byte, and block scales."""
    codes = outputs[0].astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & np.uint8(15)
    return codes, outputs[1].astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def dequantize(quantized: Sequence[FloatArray], scale: np.float32, rounded: Round) -> FloatArray:
    """Return ``code * (block scale * global scale)``."""
    codes, block_scales = quantized
    return np.asarray(codes * np.repeat(rounded(block_scales * scale), 16, -1), np.float32)


def stored(raw: Raw) -> tuple[tuple[FloatArray, ...], np.float32]:
    """Return the E2M1 values [N, K], block scales and global scale of a weight."""
    packed = raw("weight")
    codes = np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
    block_scales = raw("weight_scale").astype(np.float32)
    return (E2M1[codes], block_scales), np.float32(raw("weight_scale_2").reshape(()))
