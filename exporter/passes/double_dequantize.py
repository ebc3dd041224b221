"""Replace the FP4 placeholders by what TensorRT reads: codes and scales through two DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import onnx_ir as ir

from exporter.errors import BadGraph
from exporter.trt_ops import ACTIVATION_PLACEHOLDER, DOMAIN, WEIGHT_PLACEHOLDER

__all__ = ["BLOCK_SIZE", "ScaleDtype", "double_dequantize"]

ScaleDtype = Literal["float32", "bfloat16"]

BLOCK_SIZE: Final = 16


def double_dequantize(model: ir.Model, leaders: Mapping[str, str], scale_dtype: ScaleDtype) -> None:
    """Rewrite in place.

    1. ``TRT_FP4QDQ(X.weight)`` becomes DequantizeLinear(E4M3 block scales, global scale), then
       DequantizeLinear(FP4 codes, that): initializers ``X.weight``, ``X.weight_scale`` and a ``weight_scale_2``.
    2. ``TRT_FP4DynamicQDQ(x)`` becomes ``trt::TRT_FP4DynamicQuantize(x, input_scale)`` and the same two
       DequantizeLinear on its outputs.
    3. Linears with the same leader read one activation and one pair of global scales: the leader's. So TensorRT sees
       that they can be one GEMM.
    4. ``float32``: both products in FP32, then a Cast, which is what fake quantization computes, bit for bit.
       ``bfloat16``: ``output_dtype`` on both, no Cast; the scale is rounded to BF16 once more.

    Args:
        model: with placeholders; the new initializers have no values yet.
        leaders: module path of each quantized linear to the first member of its group.
        scale_dtype: see 4.

    Raises:
        BadGraph: a placeholder is not where it can be replaced.
    """
    rewrite = _Rewrite(model.graph, leaders, scale_dtype)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == WEIGHT_PLACEHOLDER:
            rewrite.weight(node)
        elif node.domain == DOMAIN and node.op_type == ACTIVATION_PLACEHOLDER:
            rewrite.activation(node)
    model.graph.opset_imports[DOMAIN] = 1


@dataclass
class _Rewrite:
    """One graph while it is rewritten; remembers the activation chains that later linears share."""

    graph: ir.Graph
    leaders: Mapping[str, str]
    scale_dtype: ScaleDtype
    chains: dict[tuple[str, int], ir.Value] = field(default_factory=dict)

    def weight(self, node: ir.Node) -> None:
        """Replace a weight's placeholder."""
        weight = node.inputs[0]
        if weight is None or weight.name is None or not weight.is_initializer() or weight.shape is None:
            raise BadGraph(
                f"{node.name} quantizes {weight and weight.name}, which is no initializer; expected a weight"
            )
        path = weight.name.removesuffix(".weight")
        rows, columns = (int(size) for size in weight.shape)  # type: ignore[arg-type]
        del self.graph.initializers[weight.name]
        codes = self._initializer(f"{path}.weight", ir.DataType.FLOAT4E2M1, (rows, columns))
        scales = self._initializer(f"{path}.weight_scale", ir.DataType.FLOAT8E4M3FN, (rows, columns // BLOCK_SIZE))
        overall = self._initializer(f"{self.leaders[path]}.weight_scale_2", ir.DataType.FLOAT, ())
        result = self._dequantize(node, codes, scales, overall, f"{path}/weight")
        self._replace(node, result)

    def activation(self, node: ir.Node) -> None:
        """Replace an activation's placeholder, by a chain that exists already where the group has one."""
        x = node.inputs[0]
        assert x is not None
        leader = self.leaders[node.attributes["linear"].as_string()]
        key = (leader, id(x))
        if key not in self.chains:
            self.chains[key] = self._dynamic_quantize(node, x, leader)
        self._replace(node, self.chains[key])

    def _dynamic_quantize(self, node: ir.Node, x: ir.Value, path: str) -> ir.Value:
        if x.shape is None:
            raise BadGraph(f"the input of {path} has no shape; expected [..., K] with a known K")
        overall = self._initializer(f"{path}.input_scale", ir.DataType.FLOAT, ())
        *outer, columns = x.shape
        assert isinstance(columns, int)
        quantize = ir.node(
            "TRT_FP4DynamicQuantize",
            [x, overall],
            {"axis": -1, "block_size": BLOCK_SIZE, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
            domain=DOMAIN,
            num_outputs=2,
            name=f"{path}/TRT_FP4DynamicQuantize",
        )
        codes, scales = quantize.outputs
        _describe(codes, f"{path}/input_codes", ir.DataType.FLOAT4E2M1, x.shape)
        _describe(
            scales, f"{path}/input_block_scales", ir.DataType.FLOAT8E4M3FN, ir.Shape([*outer, columns // BLOCK_SIZE])
        )
        self.graph.insert_before(node, quantize)
        return self._dequantize(node, codes, scales, overall, f"{path}/input")

    def _dequantize(self, before: ir.Node, codes: ir.Value, scales: ir.Value, overall: ir.Value, name: str) -> ir.Value:
        """Insert the two DequantizeLinear (and the Cast to BF16 after FP32 ones); return what comes out."""
        wide = self.scale_dtype == "float32"
        dtype = ir.DataType.FLOAT if wide else ir.DataType.BFLOAT16
        attributes = {} if wide else {"output_dtype": int(dtype)}
        first = ir.node("DequantizeLinear", [scales, overall], attributes, name=f"{name}_scale/DequantizeLinear")
        _describe(first.outputs[0], f"{name}_scale/DequantizeLinear_output_0", dtype, scales.shape)
        second = ir.node(
            "DequantizeLinear",
            [codes, first.outputs[0]],
            {"axis": -1, "block_size": BLOCK_SIZE, **attributes},
            name=f"{name}/DequantizeLinear",
        )
        _describe(second.outputs[0], f"{name}/DequantizeLinear_output_0", dtype, codes.shape)
        nodes = [first, second]
        if wide:
            cast = ir.node("Cast", second.outputs, {"to": int(ir.DataType.BFLOAT16)}, name=f"{name}/Cast")
            _describe(cast.outputs[0], f"{name}/Cast_output_0", ir.DataType.BFLOAT16, codes.shape)
            nodes.append(cast)
        self.graph.insert_before(before, nodes)
        return nodes[-1].outputs[0]

    def _initializer(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """Return the initializer of that name, made without a value where it is new."""
        if name not in self.graph.initializers:
            value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            self.graph.initializers[name] = value
        return self.graph.initializers[name]

    def _replace(self, node: ir.Node, value: ir.Value) -> None:
        node.outputs[0].replace_all_uses_with(value)
        self.graph.remove(node, safe=True)


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name = name
    value.type = ir.TensorType(dtype)
    value.shape = shape
