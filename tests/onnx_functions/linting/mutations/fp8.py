"""Linears in FP8, of the built-in model with its modulation in FP8."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import MODULATION, OUT, mutation

QUANTIZE = f"{MODULATION}/input/QuantizeLinear"
READ = f"{MODULATION}/input/DequantizeLinear"
WIDE = f"{MODULATION}/weight/DequantizeLinear"
OTHER = "transformer_blocks.0.norm1_context.linear"
N, K = 768, 128

# Scales


@mutation("fp8-scale-value", f"{MODULATION}.weight_scale", "accepted", "fp8")
def an_infinite_scale_of_an_fp8_weight(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.weight_scale", np.float32(np.inf))


@mutation("fp8-scale-value", f"{MODULATION}.input_scale", "accepted", "fp8")
def an_fp8_activation_under_a_scale_of_almost_nothing(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.input_scale", np.float32(1e-40))


@mutation("fp8-scale-value", f"{MODULATION}.weight_scale", "refused", "fp8")
def a_scale_of_zero_of_an_fp8_weight(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.weight_scale", np.float32(0))


@mutation("fp8-scale-value", f"{MODULATION}.input_scale", "refused", "fp8")
def a_negative_scale_of_an_fp8_activation(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.input_scale", np.float32(-0.01))


@mutation("fp8-scale-value", f"{MODULATION}.weight_scale", "refused", "fp8")
def a_nan_scale_of_an_fp8_weight(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.weight_scale", np.float32(np.nan))


@mutation("fp8-scale-axis", f"{MODULATION}.weight_scale", "slow", "fp8")
def scales_of_an_fp8_weight_along_the_sum(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.weight_scale", np.linspace(0.001, 0.002, K, dtype=np.float32), (K,))
    graph.set(WIDE, axis=1)


@mutation("fp8-scale-axis", f"{MODULATION}.input_scale", "slow", "fp8")
def scales_of_an_fp8_activation_along_the_sum(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.input_scale", np.linspace(0.001, 0.002, K, dtype=np.float32), (K,))
    graph.set(QUANTIZE, axis=1)
    graph.set(READ, axis=1)


@mutation("fp8-scale-form", f"{MODULATION}.weight_scale", "accepted", "fp8")
def a_scale_of_an_fp8_weight_for_each_output(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.weight_scale", np.linspace(0.001, 0.002, N, dtype=np.float32), (N,))
    graph.set(WIDE, axis=0)


@mutation("fp8-scale-form", f"{MODULATION}.input_scale", "accepted", "fp8")
def a_bfloat16_scale_of_an_fp8_activation(graph: Damaged) -> None:
    value = np.asarray(0.01, ml_dtypes.bfloat16)
    graph.put(f"{MODULATION}.input_scale", value, (), TensorProto.BFLOAT16)


@mutation("fp8-scale-constant", QUANTIZE, "slow", "fp8")
def a_scale_of_an_fp8_activation_that_is_computed(graph: Damaged) -> None:
    node = graph.between(QUANTIZE, 1, "ReduceMax", keepdims=0)
    graph.node(READ).input[1] = node.output[0]
    # Of something that depends on an input: a constant would be folded.
    cast = helper.make_node("Cast", ["guidance"], ["guidance_as_float"], "guidance/Cast", to=TensorProto.FLOAT)
    graph.model.graph.node.insert(0, cast)
    node.input[0] = "guidance_as_float"


@mutation("fp8-dequantize-scale", READ, "accepted", "fp8")
def an_fp8_activation_dequantized_with_another_scale(graph: Damaged) -> None:
    graph.scalar("another", 0.5)
    graph.node(READ).input[1] = "another"


@mutation("promised-weight", f"{MODULATION}/MatMul", "accepted", "fp8")
def an_fp8_weight_under_the_scale_of_another(graph: Damaged) -> None:
    graph.node(WIDE).input[1] = f"{OTHER}.weight_scale"


@mutation("promised-weight", f"{MODULATION}/MatMul", "accepted", "fp8")
def fp8_weights_exchanged(graph: Damaged) -> None:
    graph.exchange_inputs(WIDE, f"{OTHER}/weight/DequantizeLinear", 0)


# Quantizer and zero points


@mutation("fp8-quantizer", QUANTIZE, "accepted", "fp8")
def an_fp8_quantizer_that_does_not_saturate(graph: Damaged) -> None:
    graph.set(QUANTIZE, saturate=0)


@mutation("fp8-quantizer", QUANTIZE, "accepted", "fp8")
def an_fp8_quantizer_that_divides_in_bfloat16(graph: Damaged) -> None:
    graph.set(QUANTIZE, precision=int(TensorProto.BFLOAT16))


def _zero_point(graph: Damaged, node: str) -> None:
    graph.put("zero", np.array(0x38, np.uint8), (), TensorProto.FLOAT8E4M3FN)
    graph.node(node).input.append("zero")


@mutation("fp8-zero-point", WIDE, "accepted", "fp8")
def an_fp8_weight_with_a_zero_point_of_one(graph: Damaged) -> None:
    _zero_point(graph, WIDE)


@mutation("fp8-zero-point", READ, "accepted", "fp8")
def an_fp8_activation_with_a_zero_point_of_one(graph: Damaged) -> None:
    _zero_point(graph, READ)


# What is lost


@mutation("fp8-activation", f"{MODULATION}/MatMul", "slow", "fp8")
def an_fp8_weight_whose_activation_is_not_quantized(graph: Damaged) -> None:
    graph.node(f"{MODULATION}/MatMul").input[0] = graph.node(QUANTIZE).input[0]


@mutation("fp8-activation", f"{MODULATION}/MatMul", "slow", "fp8")
def a_mul_by_a_vector_behind_a_quantized_fp8_activation(graph: Damaged) -> None:
    graph.put("factors", np.linspace(0.5, 1, K).astype(ml_dtypes.bfloat16), (K,), TensorProto.BFLOAT16)
    graph.between(f"{MODULATION}/MatMul", 0, "Mul", "factors")


@mutation("fp8-weight-product", f"{MODULATION}/Transpose/inserted_0", "slow", "fp8")
def a_mul_by_a_vector_behind_an_fp8_weight(graph: Damaged) -> None:
    graph.put("factors", np.linspace(0.5, 1, K).astype(ml_dtypes.bfloat16), (K,), TensorProto.BFLOAT16)
    graph.between(f"{MODULATION}/Transpose", 0, "Mul", "factors")


def _in_16_bit(graph: Damaged) -> None:
    """Let the product read a weight in BF16."""
    codes = graph.values(f"{MODULATION}.weight").view(ml_dtypes.float8_e4m3fn).astype(ml_dtypes.bfloat16)
    graph.put("sixteen", codes, (N, K), TensorProto.BFLOAT16)
    graph.node(f"{MODULATION}/Transpose").input[0] = "sixteen"


@mutation("fp8-idle", f"{MODULATION}/MatMul", "slow", "fp8")
def an_fp8_activation_for_a_weight_in_16_bit(graph: Damaged) -> None:
    _in_16_bit(graph)


@mutation("promised-fp8", f"{MODULATION}/MatMul", "slow", "fp8")
def a_linear_promised_in_fp8_with_a_weight_in_16_bit(graph: Damaged) -> None:
    _in_16_bit(graph)
    graph.node(f"{MODULATION}/MatMul").input[0] = graph.node(QUANTIZE).input[0]


def _promise(graph: Damaged, kind: str, path: str, but: bool = False) -> None:
    entry = next(entry for entry in graph.model.metadata_props if entry.key == "fp4trt.linears")
    linears = {name: [other for other in paths if other != path] for name, paths in json.loads(entry.value).items()}
    entry.value = json.dumps(linears if but else {**linears, kind: [*linears[kind], path]})


@mutation("promised-sixteen-bit", f"{MODULATION}/MatMul", "accepted", "fp8")
def a_linear_promised_in_16_bit_with_an_fp8_weight(graph: Damaged) -> None:
    _promise(graph, "bf16", MODULATION)


@mutation("promised-sixteen-bit", f"{OUT}/MatMul", "accepted", "fp8")
def a_linear_promised_in_fp8_with_an_fp4_weight(graph: Damaged) -> None:
    _promise(graph, "fp8", OUT)


@mutation("unpromised-fp4", f"{MODULATION}/MatMul", "accepted", "fp8")
def a_linear_in_fp8_that_is_not_promised(graph: Damaged) -> None:
    _promise(graph, "", MODULATION, but=True)


@mutation("plain-weight-values", f"{MODULATION}.weight", "accepted", "fp8")
def a_nan_in_an_fp8_weight(graph: Damaged) -> None:
    codes = graph.values(f"{MODULATION}.weight")
    codes[7] = 0x7F
    graph.put(f"{MODULATION}.weight", codes)


@mutation("zero-weight", f"{MODULATION}.weight", "accepted", "fp8")
def an_fp8_weight_of_zeros(graph: Damaged) -> None:
    graph.put(f"{MODULATION}.weight", np.zeros(N * K, np.uint8))
