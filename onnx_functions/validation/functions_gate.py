"""The gate on what quantizes in ONNX Runtime, our function for FP4 and its own operator for FP8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from onnx_functions import library
from onnx_functions.simulation.simulate import runtime_session
from onnx_functions.validation.verdict import FloatArray, Gate, gate_of_offenders
from onnx_functions.validation.weight_gates import E2M1

__all__ = ["SlowFP8Quantizer", "SlowQuantizer", "functions_gate"]

SlowFP8Quantizer = Callable[[FloatArray, np.float32], npt.NDArray[np.uint8]]
"""The slow reference of FP8: (FP32, scale) to the bytes of E4M3 values."""

_SCALES: Final = (np.float32(1 / 448), np.float32(2.3e-7), np.float32(31.0))


class SlowQuantizer(Protocol):
    """The slow reference: (FP32 [..., K], global scale) to codes 0..15 and the bytes of E4M3 block scales."""

    def __call__(self, x: FloatArray, scale: np.float32, /) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Quantize."""


def functions_gate(reference: SlowQuantizer, fp8: SlowFP8Quantizer | None = None) -> Gate:
    """Check the quantizers in ONNX Runtime against the slow references, bit for bit.

    The data are normal values over 60 binary orders of magnitude, ties, zeros of both signs and subnormals.

    Args:
        reference: of NVFP4.
        fp8: of FP8, where the graph has any.
    """
    x = _hard_values()
    offenders, differing = [], 0
    checks: list[tuple[str, Callable[[FloatArray, np.float32], int]]]
    checks = [("trt::TRT_FP4DynamicQuantize", _fp4_check(reference))]
    checks += [("QuantizeLinear", _fp8_check(fp8))] if fp8 is not None else []
    for name, wrong_in in checks:
        wrong = {float(scale): wrong_in(x, scale) for scale in _SCALES}
        differing += sum(wrong.values())
        if any(wrong.values()):
            scale, count = next((scale, count) for scale, count in wrong.items() if count)
            offenders.append((name, f"{count} values differ at global scale {scale:.8g}"))
    count = len(checks) * len(_SCALES) * x.size
    told = f"{count} values and their block scales equal the slow reference"
    return gate_of_offenders("functions", offenders, differing, 0, told, count=count)


def _hard_values() -> FloatArray:
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-40, 20, (256, 1)))
    ties = np.tile([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -2.5, -5, 6, -6], (8, 2))
    subnormal = rng.uniform(-1e-39, 1e-39, (8, 32))
    x = np.concatenate([rng.standard_normal((256, 32)) * spread, ties, subnormal, np.zeros((2, 32))])
    return x.astype(np.float32)


def _fp4_check(reference: SlowQuantizer) -> Callable[[FloatArray, np.float32], int]:
    """Return what counts the codes and block scales that differ."""
    node = helper.make_node(
        "TRT_FP4DynamicQuantize", ["x", "scale"], ["q", "s"], domain="trt", axis=-1, block_size=16, scale_type=17
    )
    session = runtime_session(_model(node), Path.cwd())

    def count(x: FloatArray, scale: np.float32) -> int:
        codes, block_scales = session.run(None, {"x": x, "scale": np.asarray(scale)})
        wanted_codes, wanted_scales = reference(x, scale)
        wrong = int((codes.view(np.uint32) != E2M1[wanted_codes].view(np.uint32)).sum())
        return wrong + int((_as_e4m3_bytes(block_scales) != wanted_scales).sum())

    return count


def _fp8_check(reference: SlowFP8Quantizer) -> Callable[[FloatArray, np.float32], int]:
    node = helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=TensorProto.FLOAT8E4M3FN)
    session = runtime_session(_model(node), Path.cwd())

    def count(x: FloatArray, scale: np.float32) -> int:
        (codes,) = session.run(None, {"x": x, "scale": np.asarray(scale)})
        return int((_as_e4m3_bytes(codes) != reference(x, scale)).sum())

    return count


def _as_e4m3_bytes(values: FloatArray) -> npt.NDArray[np.uint8]:
    return values.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def _model(quantizer: onnx.NodeProto) -> onnx.ModelProto:
    """Return x, scale -> what a quantizer gives, all FP32."""
    value = helper.make_tensor_value_info
    casts = [helper.make_node("Cast", [name], [f"{name}:out"], to=TensorProto.FLOAT) for name in quantizer.output]
    graph = helper.make_graph(
        [quantizer, *casts],
        "quantizer",
        [value("x", TensorProto.FLOAT, ["M", "K"]), value("scale", TensorProto.FLOAT, [])],
        [value(node.output[0], TensorProto.FLOAT, ["M", f"{node.input[0]}:K"]) for node in casts],
    )
    function = library.fp4_dynamic_quantize(TensorProto.FLOAT8E4M3FN)
    opsets = [helper.make_opsetid("", library.FUNCTION_OPSET), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=11)
