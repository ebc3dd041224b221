"""The gate on the promise: do graph, checkpoint and metadata speak of the same linears, each in the same format?

Every other gate compares what the metadata list. This one checks the list, so that a graph cannot pass by promising
little.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx
from onnx import TensorProto

from onnx_functions.errors import BadGraph
from onnx_functions.linears import Graph, promised_linears
from onnx_functions.verdict import Gate, gate_of_offenders

__all__ = ["promise_gate"]

_FP4 = "nvfp4"


def promise_gate(model: onnx.ModelProto, fp4: Collection[str], linears: Collection[str]) -> Gate:
    """Check the metadata's list of linears against the checkpoint and against the graph's own nodes.

    Args:
        model: the deployable graph.
        fp4: module paths of the linears that the checkpoint has in NVFP4.
        linears: all of the checkpoint's linears, those included.
    """
    formats = {path: kind for kind, paths in promised_linears(model).items() for path in paths}
    offenders = dict(_against_checkpoint(formats, fp4, linears))
    for path, what in _against_graph(model, formats, fp4):
        offenders.setdefault(path, what)
    compared = f"{len(formats)} linears, {sum(kind == _FP4 for kind in formats.values())} of them in FP4, as promised"
    if not formats and not offenders:
        offenders["fp4trt.linears"] = "the graph's metadata promise no linear at all; export the graph again"
    return gate_of_offenders("promise", list(offenders.items()), len(offenders), 0, compared, count=len(formats))


def _fp4_products(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the paths (or node names) of the products whose weight is stored as FP4 codes."""
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and len(node.input) > 1:
            stored = graph.initializers.get(graph.source(node.input[1]))
            if stored is not None and stored.data_type == TensorProto.FLOAT4E2M1:
                yield node.name.removesuffix(f"/{node.op_type}") or node.output[0]


def _against_checkpoint(
    formats: dict[str, str], fp4: Collection[str], linears: Collection[str]
) -> Iterator[tuple[str, str]]:
    for path in sorted(linears, key=lambda path: path not in fp4):
        wanted = "in NVFP4" if path in fp4 else "in 16 bit"
        if path not in formats:
            yield path, f"the checkpoint has it {wanted}, the graph does not promise it"
        elif (formats[path] == _FP4) != (path in fp4):
            yield path, f"the checkpoint has it {wanted}, the graph promises {formats[path]}"
    for path in formats:
        if path not in linears:
            yield path, "the graph promises it, the checkpoint has no such linear"


def _against_graph(model: onnx.ModelProto, formats: dict[str, str], fp4: Collection[str]) -> Iterator[tuple[str, str]]:
    graph = Graph(model)
    for path in dict.fromkeys((*formats, *fp4)):
        wanted = formats.get(path, _FP4) == _FP4
        try:
            linear = graph.linear(path)
        except BadGraph as error:
            yield path, str(error)
            continue
        stored = graph.initializers[linear.weight_source].data_type == TensorProto.FLOAT4E2M1
        if stored != wanted:
            yield path, f"its weight is {'' if stored else 'not '}FP4 in the graph"
        elif wanted and linear.quantizer is None:
            yield path, f"node {linear.matmul} reads an activation that is not quantized"
        elif linear.quantizer is not None and not wanted:
            yield path, f"node {linear.matmul} reads a quantized activation"
    for path in _fp4_products(model):
        if path not in formats:
            yield path, "its weight is FP4 in the graph, which does not promise it"
