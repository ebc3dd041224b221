"""Attention in FP8 as the graph has it: written out where the checkpoint has its scales, and only there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from exporter import export
from exporter.passes.fp8_attention import fp8_attention as write_out
from exporter.passes.name_nodes import SCOPES
from fp4trt.errors import BadGraph

QUANTIZED = ("single_transformer_blocks.0.attn",)


@pytest.fixture(scope="module")
def graph(fp8_attention: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    folder = fp8_attention(tmp_path_factory.mktemp("mixed") / "digits-fp8", QUANTIZED)
    export(folder)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return onnx.load(folder / "model.onnx", load_external_data=False)


def test_each_attention_is_written_out_where_the_checkpoint_has_its_scales_and_only_there(
    graph: onnx.ModelProto,
) -> None:
    plain = {node.name for node in graph.graph.node if node.op_type == "Attention"}
    assert plain == {"transformer_blocks.0.attn/Attention"}
    assert {node.name.partition("/")[0] for node in graph.graph.node if node.op_type == "Softmax"} == set(QUANTIZED)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["fp4trt.attention"]) == {"fp8": list(QUANTIZED)}


def test_dequantization_feeds_both_products_and_softmax_stays_in_fp32(graph: onnx.ModelProto) -> None:
    (path,) = QUANTIZED
    makers = {output: node for node in graph.graph.node for output in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in graph.graph.value_info}
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    output = next(node for node in graph.graph.node if node.name == f"{path}/output/MatMul")
    scores = next(node for node in graph.graph.node if node.name == f"{path}/scores/MatMul")
    read = {}
    for product in (scores, output):
        for name in product.input:
            dequantize = makers[name]
            quantize = makers[dequantize.input[0]]
            assert (dequantize.op_type, quantize.op_type) == ("DequantizeLinear", "QuantizeLinear")
            assert dequantize.input[1] == quantize.input[1]
            assert types[name] == TensorProto.BFLOAT16
            assert types[quantize.output[0]] == TensorProto.FLOAT8E4M3FN
            read[quantize.name.split("/")[1]] = quantize
    assert list(read) == ["q", "k", "softmax", "v"]
    assert [read[name].input[1] for name in "qkv"] == [f"{path}.{name}_scale" for name in "qkv"]
    for name in "qkv":
        tensor = stored[f"{path}.{name}_scale"]
        assert (tensor.data_type, list(tensor.dims)) == (TensorProto.FLOAT, [])
        location = {entry.key: entry.value for entry in tensor.external_data}["location"]
        assert location == "diffusion_pytorch_model.safetensors"
    assert types[read["softmax"].input[0]] == TensorProto.FLOAT
    assert numpy_helper.to_array(stored[read["softmax"].input[1]]) == np.float32(1 / 448)
    factor = makers[makers[read["softmax"].input[0]].input[0]]
    assert numpy_helper.to_array(stored[factor.input[1]]) == np.float32(64**-0.5)


def _attention(**attributes: float) -> ir.Model:
    shape = ir.TensorType(ir.DataType.BFLOAT16), ir.Shape(["B", 2, "L", 16])
    inputs = [ir.Value(name=name, type=shape[0], shape=shape[1]) for name in "qkv"]
    node = ir.node("Attention", inputs, attributes, name="node_of_attention")
    node.metadata_props[SCOPES] = "['', 'block.attn', 'sdpa']"
    node.outputs[0].type, node.outputs[0].shape = shape
    return ir.Model(ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=11)


@pytest.mark.parametrize(
    ("model", "path", "found"),
    [
        (_attention(is_causal=1), "block.attn", r"node_of_attention masks, or has \{'is_causal': 1\}"),
        (_attention(scale=0.5), "block.attn", r"has \{'scale': 0\.5\}"),
        (_attention(), "other.attn", r"other\.attn has no Attention.*known are block\.attn"),
    ],
)
def test_attention_that_cannot_be_written_out_is_refused(model: ir.Model, path: str, found: str) -> None:
    with pytest.raises(BadGraph, match=found):
        write_out(model, {path: False})
