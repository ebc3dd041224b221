"""Rules for what lies along the chains from codes and scales to the outputs: casts, zero points, factors, dead ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from onnx import NodeProto, TensorProto, ValueInfoProto

from onnx_functions.graph.element_types import attributes_of
from onnx_functions.graph.external_data import type_name
from onnx_functions.linting.operators import graphs_of, nodes_with_inner
from onnx_functions.linting.promised_tensors import product_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject, integer, name_of

__all__ = ["RULES"]


@rule("chain-cast", "wrong", "cast what is dequantized to FP32, BF16 or FP16 alone")
def chain_cast(subject: Subject) -> Iterator[Hit]:
    """What is dequantized, weight, activation or block scales, is cast on its way to the product to FP32, BF16 or FP16.

    An integer, a truth value or 8 bits round it, and FP4 is lost. Source: measured.
    """
    waiting = [node.output[0] for pair in _pairs(subject) for node in pair]
    seen = set(waiting)
    while waiting:
        for node in subject.graph.consumers.get(waiting.pop(), ()):
            kind = integer(attributes_of(node), "to", 0)
            if node.op_type == "Cast" and kind not in _WIDE:
                yield Hit(f"casts what is dequantized to {type_name(kind)}", name_of(node), node.input[0])
            elif node.op_type in ("Cast", "Identity", "Transpose") and node.output[0] not in seen:
                seen.add(node.output[0])
                waiting.append(node.output[0])


@rule("dead-linear", "wrong", "let the outputs read the linear: export again")
def dead_linear(subject: Subject) -> Iterator[Hit]:
    """A promised linear on which no output depends: something else does its work, or nothing.

    Source: measured: TensorRT-RTX drops it without a word.
    """
    alive = _alive(subject)
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


def _alive(subject: Subject) -> set[int]:
    """Return the identities of the nodes that some output depends on."""
    waiting = [value.name for value in subject.model.graph.output]
    alive: set[int] = set()
    while waiting:
        node = subject.graph.producer.get(waiting.pop())
        if node is not None and id(node) not in alive:
            alive.add(id(node))
            waiting.extend(name for inner in nodes_with_inner([node]) for name in inner.input)
            waiting.extend(value.name for inner in nodes_with_inner([node]) for value in _outputs(inner))
    return alive


def _outputs(node: NodeProto) -> Iterator[ValueInfoProto]:
    """Yield the outputs of a node's subgraphs, which may be tensors of the graph outside."""
    for graph in graphs_of(node):
        yield from graph.output
