"""What lies around the FP4 chains: structure, promise, files."""

from __future__ import annotations

import json
import shutil

import numpy as np
from onnx import TensorProto, helper

from tests.onnx_functions.linting.damage import WEIGHTS, Damaged
from tests.onnx_functions.linting.mutations.chains import activation_quantizer_missing
from tests.onnx_functions.linting.mutations.mutation import MODULATION, OUT, TRT, WIDE, K, Q, mutation

# The structure


@mutation("trt-domain", f"{OUT}/{TRT}", "accepted")
def quantizer_in_the_empty_domain(graph: Damaged) -> None:
    graph.node(f"{OUT}/{TRT}").domain = ""


@mutation("trt-domain", f"{OUT}/{TRT}", "accepted")
def quantizer_in_an_unknown_domain(graph: Damaged) -> None:
    graph.node(f"{OUT}/{TRT}").domain = "com.nvidia"
    graph.model.opset_import.append(helper.make_opsetid("com.nvidia", 1))


@mutation("placeholder", f"{OUT}/placeholder", "refused")
def placeholder_left_in_the_graph(graph: Damaged) -> None:
    weight = graph.node(f"{OUT}/weight/Cast").output[0]
    graph.put("plain", np.zeros((128, 128), np.uint16), (128, 128), TensorProto.BFLOAT16)
    graph.remove(*(f"{OUT}/{n}" for n in ("weight_scale/DequantizeLinear", "weight/DequantizeLinear", "weight/Cast")))
    node = helper.make_node("TRT_FP4QDQ", ["plain"], [weight], f"{OUT}/placeholder", domain="trt", block_size=16)
    graph.model.graph.node.insert(0, node)


@mutation("duplicate-node-name", f"{OUT}/MatMul", "slow")
def two_products_of_one_name(graph: Damaged) -> None:
    graph.node(f"{WIDE}/MatMul").name = f"{OUT}/MatMul"


@mutation("tensor-order", f"{OUT}/MatMul", "refused")
def a_node_that_reads_what_nothing_gives(graph: Damaged) -> None:
    graph.node(f"{OUT}/MatMul").input[0] = "nothing"


@mutation("opset-declared", "opset_import", "accepted")
def opset_22(graph: Damaged) -> None:
    graph.model.opset_import[0].version = 22


@mutation("opset", "opset_import", "accepted")
def opset_17(graph: Damaged) -> None:
    graph.model.opset_import[0].version = 17


@mutation("opset", f"{OUT}/MatMul/inserted_0", "slow")
def opset_19_with_an_operator_that_has_changed(graph: Damaged) -> None:
    opset_22(graph)
    graph.model.opset_import[0].version = 19
    graph.put("scale", np.full(4, 0x3F80, np.uint16), (4,), TensorProto.BFLOAT16)
    graph.put("shift", np.zeros(4, np.uint16), (4,), TensorProto.BFLOAT16)
    node = graph.between(f"{OUT}/MatMul", 0, "GroupNormalization", "scale", "shift", num_groups=4)
    assert node.op_type == "GroupNormalization"


@mutation("trt-domain", f"{OUT}/{TRT}", "accepted")
def the_domain_of_tensorrt_not_imported(graph: Damaged) -> None:
    del graph.model.opset_import[1]


@mutation("initializer-input", f"{OUT}.weight", "accepted")
def an_initializer_among_the_inputs(graph: Damaged) -> None:
    graph.model.graph.input.append(helper.make_tensor_value_info(f"{OUT}.weight", TensorProto.FLOAT4E2M1, [128, 128]))


@mutation("dead-initializer", "left.over", "accepted")
def an_initializer_that_nothing_reads(graph: Damaged) -> None:
    graph.put("left.over", np.ones(4, np.float32), (4,), TensorProto.FLOAT)


@mutation("fp8-attention", "transformer_blocks.0.attn/Attention", "accepted")
def fp8_around_an_attention(graph: Damaged) -> None:
    node = next(node for node in graph.model.graph.node if node.op_type == "Attention")
    graph.put("one", np.float32(1), (), TensorProto.FLOAT)
    graph.put("fp8.zero", np.zeros((), np.uint8), (), TensorProto.FLOAT8E4M3FN)
    for index in range(3):
        graph.between(node.name, index, "Cast", to=int(TensorProto.BFLOAT16)).name += "/cast"
        graph.between(f"{node.name}/inserted_{index}/cast", 0, "DequantizeLinear", "one", "fp8.zero")
        dq = f"{node.name}/inserted_{index}/cast/inserted_0"
        graph.between(dq, 0, "QuantizeLinear", "one", "fp8.zero")
        graph.between(f"{dq}/inserted_0", 0, "Cast", to=int(TensorProto.FLOAT))


def _mxfp8(graph: Damaged, block: int, output: int, scale_type: int = TensorProto.UINT8) -> None:
    """Store one weight in MXFP8."""
    graph.put(f"{OUT}.weight", np.full(128 * 128, 0x38, np.uint8), (128, 128), TensorProto.FLOAT8E4M3FN)
    graph.put(f"{OUT}.e8m0", np.full(128 * 128 // block, 127, np.uint8), (128, 128 // block), scale_type)
    node = helper.make_node(
        "TRT_MXFP8DequantizeLinear",
        [f"{OUT}.weight", f"{OUT}.e8m0"],
        [f"{OUT}/mxfp8_output"],
        f"{OUT}/mxfp8",
        domain="trt",
        axis=-1,
        block_size=32,
        output_dtype=output,
    )
    graph.model.graph.node.insert(0, node)
    graph.remove(*(f"{OUT}/{name}/DequantizeLinear" for name in ("weight_scale", "weight")))
    if output == TensorProto.FLOAT:
        graph.node(f"{OUT}/weight/Cast").input[0] = f"{OUT}/mxfp8_output"
    else:
        graph.remove(f"{OUT}/weight/Cast")
        graph.node(f"{OUT}/Transpose").input[0] = f"{OUT}/mxfp8_output"


@mutation("mxfp8-storage", f"{OUT}/mxfp8", "slow")
def a_weight_in_mxfp8(graph: Damaged) -> None:
    unpromise(graph)
    activation_quantizer_missing(graph)
    _mxfp8(graph, 32, TensorProto.BFLOAT16)


@mutation("mxfp8-block-size", f"{OUT}/mxfp8", "slow")
def a_weight_in_mxfp8_with_blocks_of_64(graph: Damaged) -> None:
    a_weight_in_mxfp8(graph)
    graph.set(f"{OUT}/mxfp8", block_size=64)


@mutation("mxfp8-block-size", f"{OUT}/mxfp8", "slow")
def a_weight_in_mxfp8_with_scales_of_64(graph: Damaged) -> None:
    unpromise(graph)
    activation_quantizer_missing(graph)
    _mxfp8(graph, 64, TensorProto.BFLOAT16)


@mutation("mxfp8-float-output", f"{OUT}/mxfp8", "crashes")
def activation_and_weight_in_mxfp8_with_float_output(graph: Damaged) -> None:
    x = graph.node(f"{OUT}/{TRT}").input[0]
    activation_quantizer_missing(graph)
    _mxfp8(graph, 32, TensorProto.FLOAT)
    graph.between(f"{OUT}/MatMul", 0, "Cast", to=int(TensorProto.BFLOAT16)).input[0] = "dequantized"
    position = next(i for i, node in enumerate(graph.model.graph.node) if node.name.endswith("MatMul/inserted_0"))
    kind = {"domain": "trt", "axis": -1, "block_size": 32}
    quantize, dequantize = "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"
    nodes = (
        helper.make_node(quantize, [x], ["codes", "scales"], "quantize", output_dtype=17, **kind),
        helper.make_node(dequantize, ["codes", "scales"], ["dequantized"], "dequantize", output_dtype=1, **kind),
    )
    for node in reversed(nodes):
        graph.model.graph.node.insert(position, node)


@mutation("tensor-type", f"{OUT}.e8m0", "refused")
def scales_stored_as_float8e8m0(graph: Damaged) -> None:
    _mxfp8(graph, 32, TensorProto.BFLOAT16, 24)


# The promise


def linears_of(graph: Damaged) -> dict[str, list[str]]:
    found = {entry.key: entry.value for entry in graph.model.metadata_props}
    linears: dict[str, list[str]] = json.loads(found["fp4trt.linears"])
    return linears


@mutation("promised-fp4", f"{OUT}/MatMul", "slow")
def a_linear_that_fell_back_to_16_bit(graph: Damaged) -> None:
    graph.put("plain", np.zeros((128, 128), np.uint16), (128, 128), TensorProto.BFLOAT16)
    graph.node(f"{OUT}/Transpose").input[0] = "plain"
    graph.node(f"{OUT}/MatMul").input[0] = graph.node(f"{OUT}/{TRT}").input[0]
    names = (TRT, "input_scale/DequantizeLinear", "input/DequantizeLinear", "input/Cast")
    graph.remove(*(f"{OUT}/{name}" for name in names))
    names = ("weight_scale/DequantizeLinear", "weight/DequantizeLinear", "weight/Cast")
    graph.remove(*(f"{OUT}/{name}" for name in names))


@mutation("promised-sixteen-bit", f"{OUT}/MatMul", "accepted")
def a_linear_in_fp4_that_is_promised_in_16_bit(graph: Damaged) -> None:
    linears = linears_of(graph)
    linears["nvfp4"].remove(OUT)
    linears["bf16"].append(OUT)
    graph.metadata("fp4trt.linears", json.dumps(linears))


@mutation("promised-linear", f"{OUT}/MatMul", "slow")
def a_promised_linear_is_missing(graph: Damaged) -> None:
    graph.node(f"{OUT}/MatMul").name = "elsewhere/MatMul"


@mutation("promised-weight", f"{Q}/MatMul", "accepted")
def the_weights_of_two_linears_exchanged(graph: Damaged) -> None:
    for kind in ("weight", "weight_scale"):
        left, right = (graph.node(f"{path}/{kind}/DequantizeLinear") for path in (Q, K))
        left.input[0], right.input[0] = right.input[0], left.input[0]


@mutation("merge-scales", f"{Q}/MatMul", "slow")
def unequal_global_scales_in_a_group(graph: Damaged) -> None:
    graph.scalar(f"{K}.weight_scale_2", 0.001)
    graph.node(f"{K}/weight_scale/DequantizeLinear").input[1] = f"{K}.weight_scale_2"


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_key_of_the_metadata_is_missing(graph: Damaged) -> None:
    graph.metadata("fp4trt.symbols", None)


@mutation("promise-metadata", "fp4trt.linears", "accepted")
def a_promise_that_is_no_json(graph: Damaged) -> None:
    graph.metadata("fp4trt.linears", "{")


@mutation("promise-metadata", "fp4trt.linears", "accepted")
def a_promise_without_fp4(graph: Damaged) -> None:
    graph.metadata("fp4trt.linears", json.dumps({"bf16": linears_of(graph)["bf16"]}))


@mutation("promise-family", "fp4trt.family", "accepted")
def an_unknown_family(graph: Damaged) -> None:
    graph.metadata("fp4trt.family", "fluxx")


@mutation("contract-names", "latent", "accepted")
def the_output_renamed(graph: Damaged) -> None:
    graph.rename("latent", "sample")


@mutation("contract-names", "pooled_projections", "accepted")
def an_input_renamed(graph: Damaged) -> None:
    graph.rename("pooled_projections", "pooled_projection")


@mutation("contract-names", "img_ids", "accepted")
def two_inputs_reordered(graph: Damaged) -> None:
    inputs = list(graph.model.graph.input)
    inputs[4], inputs[5] = inputs[5], inputs[4]
    del graph.model.graph.input[:]
    graph.model.graph.input.extend(inputs)


@mutation("contract-types", "txt_ids", "refused")
def an_input_of_another_type(graph: Damaged) -> None:
    value = next(value for value in graph.model.graph.input if value.name == "txt_ids")
    value.type.tensor_type.elem_type = TensorProto.BFLOAT16


@mutation("contract-dims", "hidden_states", "accepted")
def a_fixed_batch(graph: Damaged) -> None:
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "B":
                dim.dim_value = 1


@mutation("contract-dims", "txt_ids", "accepted")
def a_fixed_text_length(graph: Damaged) -> None:
    value = next(value for value in graph.model.graph.input if value.name == "txt_ids")
    value.type.tensor_type.shape.dim[0].dim_value = 8


@mutation("weight-only", f"{MODULATION}.weight", "slow")
def no_activation_quantized_and_nothing_promised(graph: Damaged) -> None:
    unpromise(graph)
    for node in [node for node in graph.model.graph.node if node.op_type == TRT]:
        path = node.name.removesuffix(f"/{TRT}")
        output = graph.node(f"{path}/input/Cast").output[0]
        for reader in graph.model.graph.node:
            reader.input[:] = [node.input[0] if name == output else name for name in reader.input]
        names = (TRT, "input_scale/DequantizeLinear", "input/DequantizeLinear", "input/Cast")
        graph.remove(*(f"{path}/{name}" for name in names))
    read = {name for node in graph.model.graph.node for name in node.input}
    kept = [tensor for tensor in graph.model.graph.initializer if tensor.name in read]
    del graph.model.graph.initializer[:]
    graph.model.graph.initializer.extend(kept)


@mutation("activation-missing", f"{OUT}/MatMul", "slow")
def one_activation_not_quantized_and_nothing_promised(graph: Damaged) -> None:
    unpromise(graph)
    activation_quantizer_missing(graph)


@mutation("merge-scales", f"{Q}/MatMul", "slow")
def unequal_global_scales_and_nothing_promised(graph: Damaged) -> None:
    unpromise(graph)
    unequal_global_scales_in_a_group(graph)


def unpromise(graph: Damaged) -> None:
    for key in [entry.key for entry in graph.model.metadata_props]:
        graph.metadata(key, None)


# The files


@mutation("external-file", f"{OUT}.weight", "refused")
def external_data_missing(graph: Damaged) -> None:
    graph.entry(f"{OUT}.weight", "location", "elsewhere.safetensors")


@mutation("external-length", f"{OUT}.weight", "refused")
def external_data_ends_early(graph: Damaged) -> None:
    graph.entry(f"{OUT}.weight", "offset", graph.weights.stat().st_size - 100)


@mutation("external-length", f"{OUT}.weight", "refused")
def external_data_shorter_than_the_shape(graph: Damaged) -> None:
    graph.entry(f"{OUT}.weight", "length", 128)


@mutation("external-length", f"{OUT}.weight", "refused")
def external_data_with_a_negative_offset(graph: Damaged) -> None:
    graph.entry(f"{OUT}.weight", "offset", -64)


@mutation("external-overlap", f"{OUT}.weight", "accepted")
def external_data_overlaps_its_neighbour(graph: Damaged) -> None:
    graph.entry(f"{OUT}.weight", "offset", graph.offset(f"{OUT}.weight") - 16)


@mutation("external-outside", f"{OUT}.weight", "refused")
def external_data_in_the_folder_above(graph: Damaged) -> None:
    shutil.copyfile(graph.weights, graph.path.parent.parent / WEIGHTS)
    graph.entry(f"{OUT}.weight", "location", f"../{WEIGHTS}")


@mutation("external-outside", f"{OUT}.weight", "refused")
def external_data_at_an_absolute_path(graph: Damaged) -> None:
    graph.entry(f"{OUT}.weight", "location", graph.weights.absolute().as_posix())


@mutation("external-link", WEIGHTS, "accepted")
def external_data_is_a_link(graph: Damaged) -> None:
    graph.weights.with_name("blob").hardlink_to(graph.weights)  # needs no privilege on Windows, as a symbolic link does
