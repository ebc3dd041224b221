"""The second witness: onnx's own ReferenceEvaluator on the deployable graph as it stands.

It reads the same file and nothing of :mod:`onnx_functions.simulation.simulate`; only the trt operator, which onnx does
not know, is given here, in numpy. Slow: for small graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from onnx_functions.graph.external_data import embedded

__all__ = ["TRT_FP4DynamicQuantize", "quantize_nvfp4", "reference_evaluator"]

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


def reference_evaluator(path: Path) -> ReferenceEvaluator:
    """Open a deployable ONNX file, with its external data, in the ReferenceEvaluator.

    Inputs and outputs have the graph's own types; BF16 is ml_dtypes.bfloat16.
    """
    return ReferenceEvaluator(embedded(path), new_ops=[TRT_FP4DynamicQuantize])
