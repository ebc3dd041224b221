"""Replace the placeholders of linears in FP8 by what TensorRT reads: QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from exporter.trt_ops import replace_placeholders

__all__ = ["fp8_quantize"]

_FP8: Final = ir.DataType.FLOAT8E4M3FN


def fp8_quantize(model: ir.Model, leaders: Mapping[str, str], _scale_dtype: str = "float32") -> None:
    """Rewrite in place, a graph that we traced.

    1. The weight's placeholder becomes DequantizeLinear of the initializer ``X.weight``, E4M3, and ``X.weight_scale``.
    2. The activation's becomes QuantizeLinear to E4M3 under ``X.input_scale``, and DequantizeLinear under the same.
    3. Linears with the same leader read one activation: the leader's. Each weight reads the scale of its own name,
       which has the same value in a group that was quantized here.

    Scales are FP32, and both DequantizeLinear give BF16 by their ``output_dtype``: the product with the scale is
    rounded once, as fake quantization rounds it. TensorRT-RTX makes one FP8 GEMM of that on SM120, with the scales
    applied to its sums (measured; a Cast behind FP32 output builds the same).

    Args:
        model: with placeholders; the new initializers have no values yet.
        leaders: module path of each linear in FP8 to the first of those that read the same input under the same scale;
            placeholders of other linears stay.
    """
    replace_placeholders(model.graph, leaders, activation=_activation, weight=_weight)


def _activation(graph: ir.Graph, before: ir.Node, x: ir.Value, path: str) -> ir.Value:
    scale = _initializer(graph, f"{path}.input_scale", ir.DataType.FLOAT, ir.Shape([]))
    quantize = ir.node("QuantizeLinear", [x, scale], {"output_dtype": int(_FP8)}, name=f"{path}/input/QuantizeLinear")
    codes = quantize.outputs[0]
    codes.name, codes.type, codes.shape = f"{path}/input_codes", ir.TensorType(_FP8), x.shape
    graph.insert_before(before, quantize)
    return _dequantize(graph, before, codes, scale, f"{path}/input")


def _weight(graph: ir.Graph, before: ir.Node, weight: ir.Value, path: str) -> ir.Value:
    """Return the dequantized weight; the initializer in 16 bits goes, and one of E4M3 takes its name."""
    assert weight.name is not None
    assert weight.shape is not None
    del graph.initializers[weight.name]
    codes = _initializer(graph, weight.name, _FP8, weight.shape)
    scale = _initializer(graph, f"{path}.weight_scale", ir.DataType.FLOAT, ir.Shape([]))
    return _dequantize(graph, before, codes, scale, f"{path}/weight")


def _dequantize(graph: ir.Graph, before: ir.Node, codes: ir.Value, scale: ir.Value, name: str) -> ir.Value:
    kind = ir.DataType.BFLOAT16
    node = ir.node("DequantizeLinear", [codes, scale], {"output_dtype": int(kind)}, name=f"{name}/DequantizeLinear")
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{node.name}_output_0", ir.TensorType(kind), codes.shape
    graph.insert_before(before, node)
    return output


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
    return graph.initializers[name]
