"""Rules for what lies along the chains from codes and scales to the outputs: casts, zero points, factors, dead ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from onnx import NodeProto, TensorProto

from onnx_functions.graph.element_types import attributes_of, integer
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import name_of
from onnx_functions.linting.promised_tensors import product_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES"]


@rule("chain-cast", "wrong", "cast what is dequantized to FP32, BF16 or FP16 alone")
def chain_cast(subject: Subject) -> Iterator[Hit]:
    """What is dequantized, weight, activation or block scales, is cast on its way to the product to FP32, BF16 or FP16.

    An integer, a truth value or 8 bits round it, and FP4 is lost. Source: measured.
    """
    dequantized = {node.output[0] for pair in _pairs(subject) for node in pair}
    for node in subject.model.graph.node:
        kind = integer(attributes_of(node), "to", 0) if node.op_type == "Cast" else _WIDE[0]
        if kind not in _WIDE and subject.graph.through_moves(node.input[0]) in dequantized:
            yield Hit(f"casts what is dequantized to {type_name(kind)}", name_of(node), node.input[0])


@rule("dead-linear", "wrong", "let the outputs read the linear: export again")
def dead_linear(subject: Subject) -> Iterator[Hit]:
    """A promised linear on which no output depends: something else does its work, or nothing.

    Source: measured: TensorRT-RTX drops it without a word.
    """
    alive = {id(node) for node in subject.graph.above(*(value.name for value in subject.model.graph.output))}
    for path in dict.fromkeys(path for paths in subject.promised.values() for path in paths):
        node = product_of(subject, path)
        if node is not None and id(node) not in alive:
            yield Hit("no output of the graph depends on it", name_of(node))


@rule("promised-product", "wrong", "write alpha=1, beta=1 and transA=0, or a MatMul and an Add")
def promised_product(subject: Subject) -> Iterator[Hit]:
    """A promised linear is the product of activation and weight, plus the bias: no factor is in it.

    Source: measured: a Gemm with another alpha is accepted.
    """
    for path in dict.fromkeys(path for paths in subject.promised.values() for path in paths):
        node = product_of(subject, path)
        if node is None or node.op_type != "Gemm":
            continue
        attributes = attributes_of(node)
        for name, wanted in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)):
            if (value := attributes.get(name, wanted)) != wanted:
                yield Hit(f"{name} is {value}; expected {wanted:g}", name_of(node))


@rule("zero-point", "wrong", "drop the zero point: NVFP4 is symmetric")
def zero_point(subject: Subject) -> Iterator[Hit]:
    """Codes and block scales of FP4 have no zero point; only one of FP8 zeros, under block scales, changes nothing.

    Source: the NVFP4 format; measured: one over block scales is accepted, one over a weight's codes refused.
    """
    nodes = {id(node): (node, index) for pair in _pairs(subject) for index, node in enumerate(pair)}
    for node, index in nodes.values():
        tensor = node.input[2] if len(node.input) > 2 else ""
        values = subject.values.get(subject.constant(tensor)) if tensor and index else None
        if tensor and not (values is not None and values.all_zero):
            yield Hit(f"dequantizes with the zero point {tensor}", name_of(node), tensor)


RULES = (chain_cast, dead_linear, promised_product, zero_point)

_WIDE: Final = (TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16, TensorProto.DOUBLE)


def _pairs(subject: Subject) -> Iterator[tuple[NodeProto, ...]]:
    """Yield the DequantizeLinear nodes of each chain: that of the codes, and those of its block scales."""
    for chain in subject.weights:
        yield (chain.values,) if chain.scales is None else (chain.values, chain.scales)
    for activation in subject.activations:
        for values in activation.values:
            yield (values, *activation.scales)
