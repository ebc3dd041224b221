"""Graphs that look whole, and in which another tensor or wire does the work."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.onnx_functions.layout_writer import swizzled
from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import MODULATION, OUT, TRT, WIDE, mutation

# Data inside the graph under the name of a stored tensor


def _inline(graph: Damaged, name: str, dims: tuple[int, ...], raw: bytes) -> TensorProto:
    tensor = graph.tensor(name)
    tensor.CopyFrom(TensorProto(name=name, data_type=tensor.data_type, dims=dims, raw_data=raw))
    return tensor


@mutation("safetensors-name", f"{OUT}.weight", "accepted")
def a_weight_inside_the_graph_under_a_stored_name(graph: Damaged) -> None:
    _inline(graph, f"{OUT}.weight", (128, 128), b"\x33" * 8192)


@mutation("safetensors-name", f"{OUT}.bias", "accepted")
def a_bias_of_one_element_under_a_stored_name(graph: Damaged) -> None:
    _inline(graph, f"{OUT}.bias", (1,), b"\x33\x40")


@mutation("safetensors-name", f"{OUT}.weight", "accepted")
def a_weight_in_a_constant_node_under_a_stored_name(graph: Damaged) -> None:
    value = TensorProto()
    value.CopyFrom(_inline(graph, f"{OUT}.weight", (128, 128), b"\x33" * 8192))
    graph.model.graph.initializer.remove(graph.tensor(f"{OUT}.weight"))
    graph.model.graph.node.insert(0, helper.make_node("Constant", [], [f"{OUT}.weight"], "constant", value=value))


@mutation("safetensors-name", f"{OUT}.input_scale", "accepted")
def an_activation_scale_inside_the_graph(graph: Damaged) -> None:
    _inline(graph, f"{OUT}.input_scale", (), np.float32(3).tobytes())


# What stands beside a product


@mutation("promised-branch", f"{OUT}/MatMul", "accepted")
def the_smoothing_of_another_linear(graph: Damaged) -> None:
    name, ones = f"{MODULATION}.pre_quant_scale", b"\x80\x3f" * 128
    graph.model.graph.initializer.append(helper.make_tensor(name, TensorProto.BFLOAT16, [128], ones, raw=True))
    graph.between(f"{OUT}/TRT_FP4DynamicQuantize", 0, "Mul", name)


# What is dequantized and does not arrive


def _through(graph: Damaged, node: str, index: int, kind: int, back: int) -> None:
    """Cast one input of a node to a type and back."""
    graph.between(node, index, "Cast", to=back).name = "back"
    graph.between("back", 0, "Cast", to=kind).name = "away"


@mutation("chain-cast", "away", "slow")
def a_weight_cast_to_integers_and_back(graph: Damaged) -> None:
    _through(graph, f"{OUT}/MatMul", 1, int(TensorProto.INT64), int(TensorProto.BFLOAT16))


@mutation("chain-cast", "away", "refused")
def a_weight_cast_to_8_bits_and_back(graph: Damaged) -> None:
    _through(graph, f"{OUT}/MatMul", 1, int(TensorProto.FLOAT8E4M3FN), int(TensorProto.BFLOAT16))


@mutation("chain-cast", "away", "slow")
def an_activation_cast_to_integers_and_back(graph: Damaged) -> None:
    _through(graph, f"{OUT}/MatMul", 0, int(TensorProto.INT64), int(TensorProto.BFLOAT16))


@mutation("chain-cast", "away", "slow")
def block_scales_cast_to_integers_and_back(graph: Damaged) -> None:
    _through(graph, f"{OUT}/weight/DequantizeLinear", 1, int(TensorProto.INT64), int(TensorProto.FLOAT))


@mutation("chain-cast", "away", "slow")
def block_scales_of_an_activation_cast_to_truth_values_and_back(graph: Damaged) -> None:
    _through(graph, f"{OUT}/input/DequantizeLinear", 1, int(TensorProto.BOOL), int(TensorProto.FLOAT))


@mutation("dead-linear", f"{OUT}/MatMul", "slow")
def another_product_in_place_of_a_linear(graph: Damaged) -> None:
    graph.put("shadow", np.full((128, 128), 0x3C10, np.uint16), (128, 128), TensorProto.BFLOAT16)
    own = graph.node(f"{OUT}/Add").output[0]
    for node in graph.model.graph.node:
        node.input[:] = ["shadow_output" if name == own else name for name in node.input]
    position = next(i for i, node in enumerate(graph.model.graph.node) if node.name == f"{OUT}/Add")
    inputs = [graph.node(f"{OUT}/{TRT}").input[0], "shadow"]
    graph.model.graph.node.insert(position + 1, helper.make_node("MatMul", inputs, ["shadow_output"], "shadow"))


@mutation("dead-linear", f"{OUT}/MatMul", "slow")
def an_output_that_is_an_input(graph: Damaged) -> None:
    last = next(node for node in graph.model.graph.node if "latent" in node.output)
    last.output[0] = "computed"
    graph.model.graph.node.append(helper.make_node("Identity", ["hidden_states"], ["latent"], "shortcut"))


# Sums and products with more in them


@mutation("promised-bias", f"{OUT}.bias", "accepted")
def a_bias_that_is_added_twice(graph: Damaged) -> None:
    graph.between(f"{OUT}/Add", 0, "Add", f"{OUT}.bias")


@mutation("promised-product", f"{MODULATION}/MatMul", "accepted")
def a_linear_with_a_factor(graph: Damaged) -> None:
    graph.node(f"{MODULATION}/MatMul").op_type = "Gemm"
    graph.set(f"{MODULATION}/MatMul", alpha=0.5)


def _zero_point(graph: Damaged, node: str, value: int, dims: tuple[int, ...], kind: int) -> None:
    graph.put("zero", np.full(max(1, int(np.prod(dims)) // 2), value, np.uint8), dims, kind)
    graph.node(f"{OUT}/{node}/DequantizeLinear").input.append("zero")


@mutation("zero-point", f"{OUT}/weight_scale/DequantizeLinear", "accepted")
def block_scales_with_a_zero_point(graph: Damaged) -> None:
    _zero_point(graph, "weight_scale", 0x40, (), TensorProto.FLOAT8E4M3FN)


@mutation("zero-point", f"{OUT}/input_scale/DequantizeLinear", "accepted")
def block_scales_of_an_activation_with_a_zero_point(graph: Damaged) -> None:
    _zero_point(graph, "input_scale", 0x40, (), TensorProto.FLOAT8E4M3FN)


@mutation("zero-point", f"{OUT}/weight/DequantizeLinear", "refused")
def codes_with_a_zero_point(graph: Damaged) -> None:
    _zero_point(graph, "weight", 0x22, (128, 8), TensorProto.FLOAT4E2M1)


# Data in no place, or in two


@mutation("external-length", f"{OUT}.bias", "refused")
def an_initializer_without_data(graph: Damaged) -> None:
    graph.tensor(f"{OUT}.bias").data_location = TensorProto.DEFAULT


@mutation("external-length", f"{OUT}.bias", "accepted")
def other_data_inside_the_graph_beside_a_stored_tensor(graph: Damaged) -> None:
    graph.tensor(f"{OUT}.bias").raw_data = b"\x33\x40" * 128


# What is declared twice, or not at all


@mutation("operator-form", f"{OUT}/weight/DequantizeLinear", "accepted")
def a_block_size_that_stands_twice(graph: Damaged) -> None:
    node = graph.node(f"{OUT}/weight/DequantizeLinear")
    attributes = [helper.make_attribute("block_size", 32), *node.attribute]
    del node.attribute[:]
    node.attribute.extend(attributes)


@mutation("opset-import", "opset_import", "accepted")
def two_opsets(graph: Damaged) -> None:
    graph.model.opset_import.append(helper.make_opsetid("", 19))


@mutation("opset-import", "opset_import", "refused")
def no_opset(graph: Damaged) -> None:
    kept = [entry for entry in graph.model.opset_import if entry.domain]
    del graph.model.opset_import[:]
    graph.model.opset_import.extend(kept)


@mutation("opset-import", "opset_import", "accepted")
def opset_99(graph: Damaged) -> None:
    graph.model.opset_import[0].version = 99


# Promises that no graph keeps


def _symbols(graph: Damaged, **changed: dict[str, Any]) -> None:
    """Change entries of the promised symbols."""
    found = {entry.key: entry.value for entry in graph.model.metadata_props}
    symbols = json.loads(found["fp4trt.symbols"])
    for name, entries in changed.items():
        symbols[name] |= entries
    graph.metadata("fp4trt.symbols", json.dumps(symbols))


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_batch_whose_least_is_above_its_largest(graph: Damaged) -> None:
    _symbols(graph, B={"min": 4, "default": 9, "max": 1})


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_token_of_no_pixels(graph: Damaged) -> None:
    _symbols(graph, L={"pixels_per_token": 0})


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_text_length_that_is_no_number(graph: Damaged) -> None:
    _symbols(graph, T={"min": "1"})


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_batch_that_is_a_length_of_text(graph: Damaged) -> None:
    _symbols(graph, B={"kind": "text_tokens"}, T={"kind": "batch"})


@mutation("promise-metadata", "fp4trt.scale_dtype", "accepted")
def a_promise_of_scales_in_another_type(graph: Damaged) -> None:
    graph.metadata("fp4trt.scale_dtype", "bfloat16")


@mutation("promise-metadata", "fp4trt.recipe", "accepted")
def a_promise_of_no_recipe_over_fp4(graph: Damaged) -> None:
    graph.metadata("fp4trt.recipe", "none")


@mutation("promise-metadata", "fp4trt.recipe", "accepted")
def a_promise_of_an_unknown_recipe(graph: Damaged) -> None:
    graph.metadata("fp4trt.recipe", "No Name")


@mutation("contract-dims", "latent", "accepted")
def an_output_of_another_width(graph: Damaged) -> None:
    graph.model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 99


@mutation("contract-dims", "encoder_hidden_states", "refused")
def an_input_of_no_width(graph: Damaged) -> None:
    graph.model.graph.input[1].type.tensor_type.shape.dim[2].dim_value = 0


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_symbol_of_an_unknown_kind(graph: Damaged) -> None:
    graph.metadata("fp4trt.family", "another")
    _symbols(graph, B={"kind": "pages"})


# Scales that another producer means otherwise


@mutation("block-scale-order", f"{WIDE}.weight_scale", "accepted")
def block_scales_in_the_tiles_of_cublas(graph: Damaged) -> None:
    graph.put(f"{WIDE}.weight_scale", swizzled(graph.values(f"{WIDE}.weight_scale").reshape(512, 8)))


@mutation("weight-scale-reciprocal", f"{OUT}.weight_scale_2", "accepted")
def a_reciprocal_global_scale(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", 2688 / 64.0)


@mutation("input-scale-reciprocal", f"{OUT}.input_scale", "accepted")
def a_reciprocal_input_scale(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", 2688 / 8.0)
