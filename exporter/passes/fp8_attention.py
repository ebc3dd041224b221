"""Write attention out as two products whose operands are in FP8: the form that TensorRT fuses into one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from calibration.formats.fp8_attention import PROBABILITY_SCALE
from exporter.naming import name_of
from exporter.passes.name_nodes import module_path
from fp4trt.errors import BadGraph

__all__ = ["fp8_attention"]

_FP32, _FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN

_PLAIN: Final[Mapping[str, float]] = {"is_causal": 0, "qk_matmul_output_mode": 0, "softcap": 0.0}
"""Attributes that change nothing; any other is not written out here."""


def fp8_attention(model: ir.Model, attentions: Mapping[str, bool]) -> None:
    """Rewrite in place, a graph that we traced: the Attention of each of these modules, and of no other.

    1. Query, key (transposed) and value are rounded to E4M3: QuantizeLinear and DequantizeLinear under ``A.q_scale``,
       ``A.k_scale`` and ``A.v_scale``, new initializers without values yet. DequantizeLinear feeds MatMul directly.
    2. Products in the operands' type; between them, in FP32, the factor 1 / sqrt(D) and Softmax.
    3. What Softmax gives is rounded to E4M3 under 1 / 448, out of FP32: a Cast before it would undo the fusion.
    4. What the second product gives is rounded as its operands are, where that is asked for.

    This is what :class:`calibration.formats.fp8_attention.FP8Attention` computes. Measured with TensorRT-RTX 1.7.1: one
    kernel, where a sequence is never shorter than 32; the Attention operator with rounded operands would run in 16 bit.

    Args:
        model: constants folded, nodes still with the tracer's scopes.
        attentions: module path to whether what the second product gives is rounded too, under ``A.output_scale``.

    Raises:
        BadGraph: there is no Attention in one of the modules, or one that masks.
    """
    found = {module_path(node): node for node in model.graph if node.op_type == "Attention"}
    scales: dict[float, ir.Value] = {}
    for path, rounds_output in attentions.items():
        if path not in found:
            raise BadGraph(f"{path} has no Attention to write out in FP8; known are {', '.join(found) or 'none'}")
        _WrittenOut(model.graph, found[path], path, scales, rounds_output).replace()


@dataclass
class _WrittenOut:
    """One Attention while it is replaced; ``constants`` are shared by all of the graph."""

    graph: ir.Graph
    node: ir.Node
    path: str
    constants: dict[float, ir.Value]
    rounds_output: bool

    def replace(self) -> None:
        """Put the products in the place of the node."""
        query, key, value = self._operands()
        shapes = [list(operand.shape or ()) for operand in (query, key, value)]
        assert all(len(shape) == 4 for shape in shapes), f"{self.path}: {shapes}"
        batch, heads, length, size = shapes[0]
        assert isinstance(size, int), f"{self.path}: the width of a head is not known"
        keys = shapes[1][2]
        turned = self._add("k/Transpose", [key], ir.Shape([batch, heads, size, keys]), key.dtype, perm=[0, 1, 3, 2])
        q, k, v = self._rounded("q", query), self._rounded("k", turned), self._rounded("v", value)
        shape = ir.Shape([batch, heads, length, keys])
        scores = self._add("scores/MatMul", [q, k], shape, query.dtype)
        wide = self._add("scores/Cast", [scores], shape, _FP32, to=int(_FP32))
        scaled = self._add("scores/Mul", [wide, self._constant(size**-0.5)], shape, _FP32)
        softmax = self._add("softmax/Softmax", [scaled], shape, _FP32, axis=-1)
        rounded = self._quantized("softmax", softmax, self._constant(PROBABILITY_SCALE), query.dtype)
        output = self._add("output/MatMul", [rounded, v], ir.Shape([batch, heads, length, shapes[2][-1]]), query.dtype)
        if self.rounds_output:
            output = self._rounded("output", output)
        self.node.outputs[0].replace_all_uses_with(output)
        self.graph.remove(self.node, safe=True)

    def _operands(self) -> list[ir.Value]:
        values = [value for value in self.node.inputs if value is not None]
        others = {name: value.value for name, value in self.node.attributes.items() if value.value != _PLAIN.get(name)}
        if len(values) != 3 or others:
            raise BadGraph(f"{name_of(self.node)} masks, or has {others}; expected plain attention for FP8")
        return values

    def _rounded(self, operand: str, x: ir.Value) -> ir.Value:
        name = f"{self.path}.{operand}_scale"
        scale = ir.Value(name=name, type=ir.TensorType(_FP32), shape=ir.Shape(()))
        self.graph.initializers[name] = scale
        return self._quantized(operand, x, scale, x.dtype)

    def _quantized(self, operand: str, x: ir.Value, scale: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        assert dtype is not None
        codes = self._add(f"{operand}/QuantizeLinear", [x, scale], x.shape, _FP8, output_dtype=int(_FP8))
        return self._add(f"{operand}/DequantizeLinear", [codes, scale], x.shape, dtype, output_dtype=int(dtype))

    def _add(
        self,
        name: str,
        inputs: list[ir.Value],
        shape: ir.Shape | None,
        dtype: ir.DataType | None,
        **attributes: int | list[int],
    ) -> ir.Value:
        """Insert a node, and return what it gives."""
        assert dtype is not None
        node = ir.node(name.rpartition("/")[2], inputs, attributes, name=f"{self.path}/{name}")
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{node.name}_output_0", ir.TensorType(dtype), shape
        self.graph.insert_before(self.node, node)
        return output

    def _constant(self, number: float) -> ir.Value:
        if number not in self.constants:
            tensor = ir.tensor(np.float32(number), name=f"fp8_attention_{len(self.constants)}")
            value = ir.Value(name=tensor.name, type=ir.TensorType(_FP32), shape=ir.Shape(()), const_value=tensor)
            self.graph.initializers[str(value.name)] = value
            self.constants[number] = value
        return self.constants[number]
