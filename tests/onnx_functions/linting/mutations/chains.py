"""The chains of an FP4 linear: weight, scales, activation, product."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper

from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import DEEP, OUT, TRT, WIDE, K, mutation

# The weight's chain


@mutation("weight-block-size", f"{OUT}/weight/DequantizeLinear", "accepted")
def weight_block_size_32(graph: Damaged) -> None:
    graph.set(f"{OUT}/weight/DequantizeLinear", block_size=32)


@mutation("weight-block-size", f"{OUT}/weight/DequantizeLinear", "accepted")
def weight_block_size_64(graph: Damaged) -> None:
    graph.set(f"{OUT}/weight/DequantizeLinear", block_size=64)


@mutation("weight-block-size", f"{OUT}/weight/DequantizeLinear", "accepted")
def weight_block_size_missing(graph: Damaged) -> None:
    graph.set(f"{OUT}/weight/DequantizeLinear", block_size=None)


@mutation("weight-scale-shape", f"{WIDE}.weight_scale", "accepted")
def block_scales_of_32_codes_under_a_declared_16(graph: Damaged) -> None:
    graph.put(f"{WIDE}.weight_scale", graph.values(f"{WIDE}.weight_scale")[: 512 * 4], (512, 4))


@mutation("weight-scale-shape", f"{WIDE}.weight_scale", "refused")
def block_scales_transposed(graph: Damaged) -> None:
    values = graph.values(f"{WIDE}.weight_scale").reshape(512, 8).T
    graph.put(f"{WIDE}.weight_scale", values, (8, 512))


@mutation("weight-block-size", f"{WIDE}/weight/DequantizeLinear", "accepted")
def block_size_32_with_scales_of_32_codes(graph: Damaged) -> None:
    block_scales_of_32_codes_under_a_declared_16(graph)
    graph.set(f"{WIDE}/weight/DequantizeLinear", block_size=32)


@mutation("weight-scale-type", f"{OUT}.weight_scale", "refused")
def block_scales_in_e5m2(graph: Damaged) -> None:
    graph.tensor(f"{OUT}.weight_scale").data_type = TensorProto.FLOAT8E5M2


@mutation("weight-codes-type", f"{OUT}.weight", "slow")
def codes_declared_as_int4(graph: Damaged) -> None:
    graph.tensor(f"{OUT}.weight").data_type = TensorProto.INT4


@mutation("weight-codes-type", f"{OUT}.weight", "refused")
def codes_declared_as_uint4(graph: Damaged) -> None:
    graph.tensor(f"{OUT}.weight").data_type = TensorProto.UINT4


@mutation("weight-axis", f"{OUT}/weight/DequantizeLinear", "slow")
def weight_axis_0(graph: Damaged) -> None:
    graph.set(f"{OUT}/weight/DequantizeLinear", axis=0)
    values = graph.values(f"{OUT}.weight_scale").reshape(128, 8).T
    graph.put(f"{OUT}.weight_scale", values, (8, 128))


@mutation("weight-single-dequantize", f"{OUT}/weight/DequantizeLinear", "slow")
def single_dequantize_with_float_block_scales(graph: Damaged) -> None:
    scales = graph.values(f"{OUT}.weight_scale").view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    graph.put(f"{OUT}.block_scales", scales * graph.values(f"{OUT}.weight_scale_2"), (128, 8), TensorProto.FLOAT)
    graph.node(f"{OUT}/weight/DequantizeLinear").input[1] = f"{OUT}.block_scales"
    graph.remove(f"{OUT}/weight_scale/DequantizeLinear")


@mutation("weight-scales-crossed", f"{OUT}/weight/DequantizeLinear", "accepted")
def block_scales_of_another_weight(graph: Damaged) -> None:
    graph.node(f"{OUT}/weight/DequantizeLinear").input[1] = graph.node(f"{K}/weight_scale/DequantizeLinear").output[0]


@mutation("weight-scales-crossed", f"{OUT}/weight/DequantizeLinear", "accepted")
def block_scale_tensor_of_another_weight(graph: Damaged) -> None:
    graph.node(f"{OUT}/weight_scale/DequantizeLinear").input[0] = f"{K}.weight_scale"


@mutation("weight-product", f"{OUT}/MatMul/inserted_1", "slow")
def vector_product_behind_the_weight(graph: Damaged) -> None:
    graph.put("ones", np.ones(128, ml_dtypes.bfloat16), (128,), TensorProto.BFLOAT16)
    graph.between(f"{OUT}/MatMul", 1, "Mul", "ones")


@mutation("weight-product", f"{OUT}/Transpose/inserted_0", "slow")
def scalar_product_behind_the_weight(graph: Damaged) -> None:
    graph.put("two", np.array(2, ml_dtypes.bfloat16), (), TensorProto.BFLOAT16)
    graph.between(f"{OUT}/Transpose", 0, "Mul", "two")


@mutation("weight-product", f"{OUT}/MatMul", "slow")
def weight_not_transposed(graph: Damaged) -> None:
    graph.node(f"{OUT}/MatMul").input[1] = graph.node(f"{OUT}/Transpose").input[0]
    graph.remove(f"{OUT}/Transpose")


@mutation("weight-output-type", f"{OUT}/weight/DequantizeLinear", "refused")
def output_dtype_on_the_second_dequantize_alone(graph: Damaged) -> None:
    graph.set(f"{OUT}/weight/DequantizeLinear", output_dtype=int(TensorProto.BFLOAT16))


@mutation("global-scale-type", f"{OUT}.weight_scale_2", "refused")
def weight_global_scale_in_bfloat16(graph: Damaged) -> None:
    value = graph.values(f"{OUT}.weight_scale_2").astype(ml_dtypes.bfloat16)
    graph.put(f"{OUT}.weight_scale_2", value, (), TensorProto.BFLOAT16)
    graph.set(f"{OUT}/weight_scale/DequantizeLinear", output_dtype=int(TensorProto.FLOAT))


@mutation("global-scale-type", f"{OUT}.weight_scale_2", "slow")
def weight_global_scale_per_channel(graph: Damaged) -> None:
    value = np.repeat(graph.values(f"{OUT}.weight_scale_2"), 128)
    graph.put(f"{OUT}.weight_scale_2", value, (128,), TensorProto.FLOAT)
    graph.set(f"{OUT}/weight_scale/DequantizeLinear", axis=0)


@mutation("global-scale-type", f"{OUT}.weight_scale_2", "accepted")
def weight_global_scale_in_bfloat16_with_a_bfloat16_chain(graph: Damaged) -> None:
    value = graph.values(f"{OUT}.weight_scale_2").astype(ml_dtypes.bfloat16)
    graph.put(f"{OUT}.weight_scale_2", value, (), TensorProto.BFLOAT16)


@mutation("weight-scale-constant", f"{OUT}/weight_scale/DequantizeLinear", "slow")
def weight_global_scale_computed_at_run_time(graph: Damaged) -> None:
    graph.model.graph.node.insert(0, helper.make_node("ReduceMax", ["guidance"], ["largest"], "largest", keepdims=0))
    graph.node(f"{OUT}/weight_scale/DequantizeLinear").input[1] = "largest"


# The activation's chain


@mutation("activation-block-size", f"{OUT}/{TRT}", "refused")
def activation_block_size_32(graph: Damaged) -> None:
    graph.set(f"{OUT}/{TRT}", block_size=32)


@mutation("activation-block-size", f"{OUT}/{TRT}", "accepted")
def activation_block_size_missing(graph: Damaged) -> None:
    graph.set(f"{OUT}/{TRT}", block_size=None)


@mutation("activation-axis", f"{OUT}/{TRT}", "refused")
def activation_axis_missing(graph: Damaged) -> None:
    graph.set(f"{OUT}/{TRT}", axis=None)


@mutation("activation-axis", f"{OUT}/{TRT}", "refused")
def activation_axis_1(graph: Damaged) -> None:
    graph.set(f"{OUT}/{TRT}", axis=1)


@mutation("activation-scale-type", f"{OUT}/{TRT}", "accepted")
def scale_type_missing(graph: Damaged) -> None:
    graph.set(f"{OUT}/{TRT}", scale_type=None)


@mutation("activation-scale-type", f"{OUT}/{TRT}", "refused")
def scale_type_bfloat16(graph: Damaged) -> None:
    graph.set(f"{OUT}/{TRT}", scale_type=int(TensorProto.BFLOAT16))


@mutation("activation-scale-constant", f"{OUT}/{TRT}", "refused")
def activation_scale_computed_at_run_time(graph: Damaged) -> None:
    graph.model.graph.node.insert(0, helper.make_node("ReduceMax", ["guidance"], ["largest"], "largest", keepdims=0))
    graph.node(f"{OUT}/{TRT}").input[1] = "largest"
    graph.node(f"{OUT}/input_scale/DequantizeLinear").input[1] = "largest"


@mutation("activation-dequantize-scale", f"{OUT}/input_scale/DequantizeLinear", "accepted")
def activation_dequantized_with_another_scale(graph: Damaged) -> None:
    graph.node(f"{OUT}/input_scale/DequantizeLinear").input[1] = f"{DEEP}.input_scale"


@mutation("activation-scales-crossed", f"{WIDE}/input/DequantizeLinear", "accepted")
def block_scales_of_another_quantizer(graph: Damaged) -> None:
    graph.node(f"{WIDE}/input/DequantizeLinear").input[1] = graph.node(f"{OUT}/input_scale/DequantizeLinear").output[0]


@mutation("activation-dequantize", f"{OUT}/input/DequantizeLinear", "accepted")
def activation_dequantized_with_block_size_32(graph: Damaged) -> None:
    graph.set(f"{OUT}/input/DequantizeLinear", block_size=32)


@mutation("activation-dequantize", f"{OUT}/input/DequantizeLinear", "refused")
def activation_dequantized_along_axis_1(graph: Damaged) -> None:
    graph.set(f"{OUT}/input/DequantizeLinear", axis=1)


@mutation("activation-missing", f"{OUT}/MatMul", "slow")
def activation_quantizer_missing(graph: Damaged) -> None:
    graph.node(f"{OUT}/MatMul").input[0] = graph.node(f"{OUT}/{TRT}").input[0]
    graph.remove(*(f"{OUT}/{name}" for name in (TRT, "input_scale/DequantizeLinear", "input/DequantizeLinear")))
    graph.remove(f"{OUT}/input/Cast")


@mutation("activation-product", f"{OUT}/MatMul/inserted_0", "refused")
def vector_product_behind_the_activation(graph: Damaged) -> None:
    graph.put("ones", np.ones(128, ml_dtypes.bfloat16), (128,), TensorProto.BFLOAT16)
    graph.between(f"{OUT}/MatMul", 0, "Mul", "ones")


@mutation("activation-idle", f"{OUT}/MatMul", "slow")
def weight_in_16_bit_under_a_quantized_activation(graph: Damaged) -> None:
    graph.put("plain", np.full((128, 128), 0x3F80, np.uint16), (128, 128), TensorProto.BFLOAT16)
    graph.node(f"{OUT}/Transpose").input[0] = "plain"
    names = ("weight_scale/DequantizeLinear", "weight/DequantizeLinear", "weight/Cast")
    graph.remove(*(f"{OUT}/{name}" for name in names))


@mutation("global-scale-type", f"{OUT}.input_scale", "accepted")
def activation_scale_in_bfloat16(graph: Damaged) -> None:
    value = graph.values(f"{OUT}.input_scale").astype(ml_dtypes.bfloat16)
    graph.put(f"{OUT}.input_scale", value, (), TensorProto.BFLOAT16)


# The data


def _in_block_scales(graph: Damaged, value: int) -> None:
    values = graph.values(f"{OUT}.weight_scale")
    values[5] = value
    graph.put(f"{OUT}.weight_scale", values)


@mutation("block-scale-values", f"{OUT}.weight_scale", "accepted")
def a_nan_among_the_block_scales(graph: Damaged) -> None:
    _in_block_scales(graph, 0x7F)


@mutation("block-scale-values", f"{OUT}.weight_scale", "accepted")
def a_negative_block_scale(graph: Damaged) -> None:
    _in_block_scales(graph, 0xB8)


@mutation("block-scale-values", f"{OUT}.weight_scale", "accepted")
def a_nan_written_into_the_weights_file(graph: Damaged) -> None:
    with graph.weights.open("r+b") as file:
        file.seek(graph.offset(f"{OUT}.weight_scale") + 7)
        file.write(b"\xff")


@mutation("activation-scale-value", f"{OUT}.input_scale", "accepted")
def activation_scale_zero(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", 0.0)


@mutation("activation-scale-value", f"{OUT}.input_scale", "accepted")
def activation_scale_negative(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", -0.002)


@mutation("activation-scale-value", f"{OUT}.input_scale", "accepted")
def activation_scale_nan(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", np.nan)


@mutation("activation-scale-value", f"{OUT}.input_scale", "accepted")
def activation_scale_infinite(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", np.inf)


@mutation("weight-global-scale-value", f"{OUT}.weight_scale_2", "refused")
def weight_global_scale_zero(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", 0.0)


@mutation("weight-global-scale-value", f"{OUT}.weight_scale_2", "refused")
def weight_global_scale_negative(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", -0.001)


@mutation("weight-global-scale-value", f"{OUT}.weight_scale_2", "accepted")
def weight_global_scale_infinite(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", np.inf)


@mutation("weight-global-scale-value", f"{OUT}.weight_scale_2", "refused")
def weight_global_scale_nan(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", np.nan)


@mutation("plain-weight-values", "x_embedder.weight", "accepted")
def a_nan_among_the_16_bit_weights(graph: Damaged) -> None:
    values = graph.values("x_embedder.weight")
    values[3] = np.nan
    graph.put("x_embedder.weight", values)


@mutation("plain-weight-values", f"{OUT}.bias", "accepted")
def an_infinite_bias(graph: Damaged) -> None:
    values = graph.values(f"{OUT}.bias")
    values[3] = np.inf
    graph.put(f"{OUT}.bias", values)


@mutation("zero-weight", f"{OUT}.weight_scale", "accepted")
def a_hole_where_the_block_scales_were(graph: Damaged) -> None:
    graph.put(f"{OUT}.weight_scale", np.zeros(128 * 8, np.uint8))
