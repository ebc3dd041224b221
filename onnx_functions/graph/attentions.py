"""Attention written out as two products: where it is in a graph, and which of its operands are in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import NodeProto

from fp4trt.json_file import object_of, strings
from onnx_functions.graph.index import MOVES, QUANTIZED, Index
from onnx_functions.graph.linears import FP8_QUANTIZER, declared, gives_fp8

__all__ = ["KEY", "OPERANDS", "Attention", "Operand", "find_attentions", "promised_attentions"]

KEY: Final = "fp4trt.attention"
"""The entry of the metadata that promises attention in FP8."""

OPERANDS: Final = ("q", "k", "softmax", "v")
"""What the two products read, in order."""

_BESIDE_SCORES: Final = (*MOVES, "Mul", "Div", "Add")
"""What may stand between the scores and their Softmax: they are scaled and masked there."""


@dataclass(frozen=True)
class Operand:
    """What a product of an attention reads.

    Attributes:
        name: of :data:`OPERANDS`.
        tensor: that the product reads.
        quantize: the QuantizeLinear to E4M3 above it; None where it is not in FP8.
        dequantize: the DequantizeLinear between; None likewise.
    """

    name: str
    tensor: str
    quantize: NodeProto | None
    dequantize: NodeProto | None

    @property
    def scale(self) -> str:
        """The tensor that is the scale it is quantized with, "" without one."""
        return self.quantize.input[1] if self.quantize is not None else ""


@dataclass(frozen=True)
class Attention:
    """Two products with a Softmax between them.

    Attributes:
        path: module path, what ``PATH/scores/MatMul`` says; in a third-party graph the second product's name.
        scores: the product of query and key.
        softmax: what follows, but for scaling and Casts.
        output: the product with the value.
        rounded: the DequantizeLinear of what that gives, where it is rounded to FP8 too; None where it is not.
        operands: q, k, softmax, v.
    """

    path: str
    scores: NodeProto
    softmax: NodeProto
    output: NodeProto
    operands: tuple[Operand, ...]
    rounded: NodeProto | None = None

    @property
    def gives(self) -> str:
        """The tensor that it gives."""
        return str((self.rounded or self.output).output[0])

    @property
    def in_fp8(self) -> bool:
        """Whether all operands of both products are in FP8."""
        return not self.missing

    @property
    def missing(self) -> tuple[str, ...]:
        """The operands that are not."""
        return tuple(operand.name for operand in self.operands if operand.quantize is None)


def promised_attentions(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the attentions that the metadata promise in FP8; none for a graph that does not say.

    Raises:
        BadGraph: the promise cannot be read.
    """
    return declared(model, KEY, lambda value: tuple(strings(object_of(value, "it").get("fp8", []), "'fp8'")), ())


def find_attentions(graph: Index) -> tuple[Attention, ...]:
    """Return every attention that is written out, in graph order."""
    softmaxes = (node for node in graph.model.graph.node if node.op_type == "Softmax" and node.input)
    return tuple(found for node in softmaxes if (found := _attention(graph, node)))


def _attention(graph: Index, softmax: NodeProto) -> Attention | None:
    scores = _scores(graph, softmax)
    output = next(_outputs(graph, softmax.output[0]), None)
    if scores is None or output is None:
        return None
    path, _, rest = scores.name.partition("/scores/")
    read = dict(zip(OPERANDS, (*scores.input, *output.input), strict=True))
    operands = tuple(_operand(graph, name, tensor) for name, tensor in read.items())
    name = path if rest else output.name.rpartition("/")[0] or output.name
    return Attention(name, scores, softmax, output, operands, _rounded(graph, output))


def _rounded(graph: Index, output: NodeProto) -> NodeProto | None:
    """Return the DequantizeLinear behind a product whose result only an FP8 quantizer reads."""
    readers = graph.consumers.get(output.output[0], [])
    if len(readers) != 1 or not _is_fp8_quantizer(graph, readers[0]):
        return None
    behind = graph.consumers.get(readers[0].output[0], [])
    return behind[0] if len(behind) == 1 and behind[0].op_type == "DequantizeLinear" else None


def _scores(graph: Index, softmax: NodeProto) -> NodeProto | None:
    """Return the product of two computed tensors that a Softmax is taken of."""
    node = graph.producer.get(softmax.input[0])
    while node is not None and node.op_type in _BESIDE_SCORES:
        above = (graph.producer.get(name) for name in node.input)
        node = next((maker for maker in above if maker is not None and maker.op_type != "Constant"), None)
    return node if node is not None and node.op_type == "MatMul" and len(node.input) == 2 else None


def _outputs(graph: Index, tensor: str) -> Iterator[NodeProto]:
    """Yield the products that read a tensor as their first operand, not transposed."""
    for reader in graph.readers(tensor, QUANTIZED):
        node = reader.node
        if node.op_type == "MatMul" and len(node.input) == 2 and (reader.index, reader.transposed % 2) == (0, 0):
            yield node


def _operand(graph: Index, name: str, tensor: str) -> Operand:
    node = graph.producer.get(graph.through_moves(tensor))
    above = graph.producer.get(node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None
    if above is None or not _is_fp8_quantizer(graph, above):
        return Operand(name, tensor, None, None)
    return Operand(name, tensor, above, node)


def _is_fp8_quantizer(graph: Index, node: NodeProto) -> bool:
    return node.op_type == FP8_QUANTIZER and gives_fp8(node, graph.constants)
