"""Linears in FP8: the nodes that stand for them, beside those in FP4 and in 16 bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from calibration.checkpoints.quantized import WEIGHTS, read
from fp4trt.safetensors_file import tensors_in_file
from onnx_functions.graph.linears import promised_linears

Q, K, V = (f"transformer_blocks.0.attn.to_{name}" for name in "qkv")
FP4 = "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def graph(traced_graph: Callable[..., onnx.ModelProto]) -> onnx.ModelProto:
    """q, k and v in FP8, one linear in FP4, all else in 16 bit."""
    return traced_graph(lambda path: path == FP4, fp8=lambda path: path in (Q, K, V), num_layers=1, num_single_layers=1)


def _attributes(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def test_a_linear_in_fp8_is_quantized_and_dequantized_once_on_each_side(graph: onnx.ModelProto) -> None:
    nodes = {node.name: node for node in graph.graph.node}
    types = {
        value.name: (value.type.tensor_type.elem_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim])
        for value in graph.graph.value_info
    }
    product = nodes[f"{K}/MatMul"]
    activation, turned = (next(n for n in graph.graph.node if name in n.output) for name in product.input)
    weight = nodes[f"{K}/weight/DequantizeLinear"]
    assert turned.op_type == "Transpose"
    assert turned.input[0] == weight.output[0]
    assert list(weight.input) == [f"{K}.weight", f"{K}.weight_scale"]
    assert types[f"{K}.weight"] == (TensorProto.FLOAT8E4M3FN, [32, 32])
    assert types[f"{K}.weight_scale"] == types[f"{Q}.input_scale"] == (TensorProto.FLOAT, [])
    quantize = nodes[f"{Q}/input/QuantizeLinear"]
    assert list(activation.input) == [quantize.output[0], f"{Q}.input_scale"]
    assert quantize.input[1] == f"{Q}.input_scale"
    assert _attributes(quantize) == {"output_dtype": TensorProto.FLOAT8E4M3FN}
    assert _attributes(weight) == _attributes(activation) == {"output_dtype": TensorProto.BFLOAT16}


def test_linears_of_one_input_share_its_quantizer_and_no_weight_scale(graph: onnx.ModelProto) -> None:
    readers = {node.name: node.input[0] for node in graph.graph.node if node.op_type == "MatMul"}
    assert readers[f"{Q}/MatMul"] == readers[f"{K}/MatMul"] == readers[f"{V}/MatMul"]
    operators = [node.op_type for node in graph.graph.node]
    assert operators.count("QuantizeLinear") == operators.count("TRT_FP4DynamicQuantize") == 1
    names = {name for node in graph.graph.node for name in node.input}
    assert {f"{path}.weight_scale" for path in (Q, K, V)} <= names
    assert f"{K}.input_scale" not in names


def test_an_export_points_at_the_codes_and_promises_what_the_checkpoint_has(fp8_digits: Path) -> None:
    model = onnx.load(fp8_digits / "model.onnx", load_external_data=False)
    checkpoint, stored = read(fp8_digits), tensors_in_file(fp8_digits / WEIGHTS)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for path in checkpoint.fp8:
        place = {entry.key: entry.value for entry in tensors[f"{path}.weight"].external_data}
        assert (place["location"], int(place["offset"])) == (WEIGHTS, stored[f"{path}.weight"].offset)
        assert tensors[f"{path}.weight"].data_type == TensorProto.FLOAT8E4M3FN
    promised = promised_linears(model)
    assert promised["fp8"] == list(checkpoint.fp8)
    assert promised["nvfp4"] == list(checkpoint.quantized)
    assert len(promised["bf16"]) == 10
