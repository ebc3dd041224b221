"""The gate on the promise: do graph, checkpoint and metadata speak of the same linears, each in the same format?

Every other gate compares what the metadata list. This one checks the list, so that a graph cannot pass by promising
little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

import onnx

from fp4trt.errors import BadGraph
from fp4trt.number_formats import FORMATS, NVFP4
from onnx_functions.graph.index import PRODUCTS
from onnx_functions.graph.linears import Graph, promised_linears
from onnx_functions.validation.verdict import Gate, gate_of_offenders

__all__ = ["promise_gate"]

_NAMES: Final[Mapping[str, str]] = {name: kind.gemm for name, kind in FORMATS.items()}


def promise_gate(model: onnx.ModelProto, quantized: Mapping[str, str], linears: Collection[str]) -> Gate:
    """Check the metadata's list of linears against the checkpoint and against the graph's own nodes.

    Args:
        model: the deployable graph.
        quantized: module path to format of the linears that the checkpoint has quantized.
        linears: all of the checkpoint's linears, those included.
    """
    formats = {path: kind for kind, paths in promised_linears(model).items() for path in paths}
    offenders = dict(_against_checkpoint(formats, quantized, linears))
    for path, what in _against_graph(model, formats, quantized):
        offenders.setdefault(path, what)
    counts = {name: sum(found == kind for found in formats.values()) for kind, name in _NAMES.items()}
    told = " and ".join(f"{counts[name]} of them in {name}" for name in counts if counts[name] or name == NVFP4.gemm)
    compared = f"{len(formats)} linears, {told}, as promised"
    if not formats and not offenders:
        offenders["fp4trt.linears"] = "the graph's metadata promise no linear at all; export the graph again"
    return gate_of_offenders("promise", list(offenders.items()), len(offenders), 0, compared, count=len(formats))


def _quantized_products(model: onnx.ModelProto) -> Iterator[tuple[str, str]]:
    """Yield path (or node name) and format of the products whose weight is stored as codes."""
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type in PRODUCTS and len(node.input) > 1:
            kind = graph.weight_format(node.input[1])
            if kind is not None:
                yield node.name.removesuffix(f"/{node.op_type}") or node.output[0], kind


def _against_checkpoint(
    formats: Mapping[str, str], quantized: Mapping[str, str], linears: Collection[str]
) -> Iterator[tuple[str, str]]:
    words = {name: f"in {kind.title}" for name, kind in FORMATS.items()}
    for path in sorted(linears, key=lambda path: path not in quantized):
        wanted = quantized.get(path)
        held = words[wanted] if wanted else "in 16 bit"
        if path not in formats:
            yield path, f"the checkpoint has it {held}, the graph does not promise it"
        elif (formats[path] if formats[path] in _NAMES else None) != wanted:
            yield path, f"the checkpoint has it {held}, the graph promises {formats[path]}"
    for path in formats:
        if path not in linears:
            yield path, "the graph promises it, the checkpoint has no such linear"


def _against_graph(
    model: onnx.ModelProto, formats: Mapping[str, str], quantized: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    graph = Graph(model)
    for path in dict.fromkeys((*formats, *quantized)):
        promised = formats.get(path) or quantized[path]
        wanted = promised if promised in _NAMES else None
        try:
            linear = graph.linear(path)
        except BadGraph as error:
            yield path, str(error)
            continue
        stored = graph.weight_format(linear.weight)
        read = linear.quantizer.format if linear.quantizer is not None else None
        if stored != wanted:
            told = f"not {_NAMES[wanted]}" if wanted else _NAMES[stored or ""]
            yield path, f"its weight is {told} in the graph"
        elif wanted and read is None:
            yield path, f"node {linear.matmul} reads an activation that is not quantized"
        elif read is not None and read != wanted:
            what = f"an activation in {_NAMES[read]}" if wanted else "a quantized activation"
            yield path, f"node {linear.matmul} reads {what}"
    for path, kind in _quantized_products(model):
        if path not in formats:
            yield path, f"its weight is {_NAMES[kind]} in the graph, which does not promise it"
