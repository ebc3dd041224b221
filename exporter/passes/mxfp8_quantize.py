"""Replace the placeholders of linears in MXFP8 by TensorRT's own operators of that format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from exporter.trt_ops import DOMAIN, replace_placeholders

__all__ = ["mxfp8_quantize"]

_BLOCK_SIZE: Final = 32


def mxfp8_quantize(model: ir.Model, leaders: Mapping[str, str], _scale_dtype: str = "float32") -> None:
    """Rewrite in place, a graph that we traced.

    1. The weight's placeholder becomes ``trt::TRT_MXFP8DequantizeLinear`` of the initializers ``X.weight``, E4M3, and
       ``X.weight_scale``, E8M0 as UINT8: TensorRT refuses initializers of FLOAT8E8M0.
    2. The activation's becomes ``trt::TRT_MXFP8DynamicQuantize`` and the same dequantization of its outputs.
    3. Linears with the same leader read one activation: the leader's.

    Both dequantizations give BF16 by their ``output_dtype``; FP32 with a Cast behind it crashes TensorRT-RTX's builder.

    Args:
        model: with placeholders; the new initializers have no values yet.
        leaders: module path of each linear in MXFP8 to the first of those that read the same input; placeholders of
            other linears stay.
    """
    replace_placeholders(model.graph, leaders, activation=_activation, weight=_weight)


def _activation(graph: ir.Graph, before: ir.Node, x: ir.Value, path: str) -> ir.Value:
    attributes = {"axis": -1, "block_size": _BLOCK_SIZE, "output_dtype": int(ir.DataType.FLOAT8E4M3FN)}
    name = f"{path}/TRT_MXFP8DynamicQuantize"
    quantize = ir.node("TRT_MXFP8DynamicQuantize", [x], attributes, domain=DOMAIN, num_outputs=2, name=name)
    codes, scales = quantize.outputs
    codes.name, codes.type, codes.shape = f"{path}/input_codes", ir.TensorType(ir.DataType.FLOAT8E4M3FN), x.shape
    scales.name, scales.type = f"{path}/input_block_scales", ir.TensorType(ir.DataType.UINT8)
    scales.shape = _blocks(x.shape)
    graph.insert_before(before, quantize)
    return _dequantize(graph, before, codes, scales, f"{path}/input")


def _weight(graph: ir.Graph, before: ir.Node, weight: ir.Value, path: str) -> ir.Value:
    """Return the dequantized weight; the initializer in BF16 goes, and one of E4M3 takes its name."""
    assert weight.name is not None
    assert weight.shape is not None
    del graph.initializers[weight.name]
    codes = _initializer(graph, weight.name, ir.DataType.FLOAT8E4M3FN, weight.shape)
    scales = _initializer(graph, f"{path}.weight_scale", ir.DataType.UINT8, _blocks(weight.shape))
    return _dequantize(graph, before, codes, scales, f"{path}/weight")


def _blocks(shape: ir.Shape | None) -> ir.Shape:
    assert shape is not None
    *outer, columns = shape
    assert isinstance(columns, int)
    return ir.Shape([*outer, columns // _BLOCK_SIZE])


def _dequantize(graph: ir.Graph, before: ir.Node, codes: ir.Value, scales: ir.Value, name: str) -> ir.Value:
    kind = ir.DataType.BFLOAT16
    attributes = {"axis": -1, "block_size": _BLOCK_SIZE, "output_dtype": int(kind)}
    operator = "TRT_MXFP8DequantizeLinear"
    node = ir.node(operator, [codes, scales], attributes, domain=DOMAIN, name=f"{name}/{operator}")
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{node.name}_output_0", ir.TensorType(kind), codes.shape
    graph.insert_before(before, node)
    return output


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    graph.initializers[name] = value
    return value
