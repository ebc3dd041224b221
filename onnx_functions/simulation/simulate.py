"""Deployable graph to a graph that plain ONNX Runtime runs, on the same external data.

ONNX Runtime has next to no BF16 kernels and no FP4 operators. The simulation holds every BF16 tensor as FP32
and rounds it through a pair of Casts (exact, to nearest even) behind each node that computes; nodes that only
move values need no rounding. The trt quantizer and the dequantizations become functions of
:mod:`onnx_functions.library`. Tensor names stay those of the deployable graph; every input and output is FP32
(codes and block scales too). Weights are not copied: the FP4 codes are read, mapped, from where the
deployable graph has them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from fp4trt.errors import BadGraph
from fp4trt.number_formats import FORMATS
from onnx_functions import library
from onnx_functions.formats import graph_format
from onnx_functions.graph.cut import cut
from onnx_functions.graph.element_types import attributes_of, element_types
from onnx_functions.graph.external_data import in_real_files, load_graph
from onnx_functions.graph.linears import Graph, Linear

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["runtime_session", "session", "simulate", "teacher_forced"]

# Nodes that only move, choose or negate values: what was BF16 before is BF16 behind.
_MOVES: Final = frozenset(
    "Abs Concat Expand Flatten Gather GatherElements GatherND Identity Max Min Neg Pad Relu Reshape ScatterElements "
    "ScatterND Slice Split Squeeze Tile Transpose Unsqueeze Where".split()
)
_TRT_OPERATORS: Final = tuple(
    name for kind in FORMATS.values() for domain, name in (kind.quantizer, kind.dequantizer) if domain
)
_DEQUANTIZERS: Final = {kind.dequantizer[1] for kind in FORMATS.values()}
_SMALL_FLOATS: Final = (TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1)


_QUANTIZED: Final = {
    TensorProto.DataType.Value(name) for kind in FORMATS.values() for name in (kind.onnx_codes, kind.onnx_scales)
} - {int(TensorProto.FLOAT)}
"""Types of codes and block scales, which leave a simulation as FP32."""

_FEW_WEIGHTS: Final = 1 << 24
"""Elements of the weights up to which a model counts as small: its activations all fit into memory at once."""


@dataclass
class _Rewrite:
    """What is known while the nodes of one graph are rewritten."""

    types: Mapping[str, int]
    round_to_bfloat16: bool
    exact: Collection[str]
    renamed: dict[str, str] = field(default_factory=dict)
    nodes: list[NodeProto] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)

    def cast(self, source: str, target: str, to: int) -> None:
        """Append a Cast that is named after its output."""
        self.nodes.append(helper.make_node("Cast", [source], [target], target, to=to))

    def round(self, source: str, target: str) -> None:
        """Append the pair of Casts that rounds FP32 `source` to BF16 values, held as FP32 in `target`."""
        self.cast(source, f"{target}/as_bfloat16", TensorProto.BFLOAT16)
        self.cast(f"{target}/as_bfloat16", target, TensorProto.FLOAT)


def session(
    model: str | Path,
    *,
    bypass_activation_quantizers: bool = False,
    float32: bool = False,
    threads: int = 0,
) -> ort.InferenceSession:
    """Open a deployable ONNX file in ONNX Runtime on the CPU.

    The session's inputs and outputs carry the graph's names and shapes and are all FP32.

    Args:
        model: the file that `fp4trt export` wrote; its external data stay where they are.
        bypass_activation_quantizers: leave activations unquantized.
        float32: compute in FP32 what the graph computes in BF16.
        threads: of one operator; 0 takes ONNX Runtime's default.

    Raises:
        BadGraph: the file is no such graph.
    """
    path = Path(model)
    simulated = simulate(load_graph(path), bypass_activation_quantizers=bypass_activation_quantizers, float32=float32)
    return runtime_session(simulated, path.parent, threads)


def runtime_session(model: onnx.ModelProto, directory: Path, threads: int = 0) -> ort.InferenceSession:
    """Open a simulated graph whose external data lie in `directory`."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what it logs as an error it also raises
    model, folder = in_real_files(model, directory)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    # Folding a weight's dequantization would make an FP32 copy of it, eight times its size.
    options.add_session_config_entry("session.disable_qdq_constant_folding", "1")
    # A product of two activations in FP8 would become a MatMulIntegerToFloat, which has no FP8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    # Planning which buffer serves again takes four fifths of opening a graph of thousands of nodes.
    options.enable_mem_reuse = sum(math.prod(tensor.dims) for tensor in model.graph.initializer) > _FEW_WEIGHTS
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def simulate(
    model: onnx.ModelProto,
    *,
    bypass_activation_quantizers: bool = False,
    float32: bool = False,
    exact: Collection[str] = (),
) -> onnx.ModelProto:
    """Rewrite a deployable graph for ONNX Runtime.

    Args:
        model: the deployable graph, external data not loaded; not changed.
        bypass_activation_quantizers: leave activations unquantized.
        float32: no rounding to BF16 anywhere.
        exact: names of nodes whose results are not rounded to BF16.

    Raises:
        BadGraph: the graph holds something that a deployable graph does not.
    """
    source = _without_activation_quantizers(model) if bypass_activation_quantizers else model
    state = _Rewrite(element_types(source), not float32, exact)
    result = onnx.ModelProto(ir_version=max(source.ir_version, 11))
    result.graph.name = source.graph.name
    _inputs(source, result, state)
    _initializers(source, result, state)
    outputs = [value.name for value in source.graph.output]
    # ONNX Runtime cannot hand FP4 or FP8 to numpy: such an output leaves through a Cast.
    small = {name for name in outputs if state.types[name] in _QUANTIZED}
    state.renamed.update({name: f"{name}/as_float8" for name in small})
    for node in source.graph.node:
        _node(node, state)
    for name in sorted(small):
        state.cast(state.renamed[name], name, TensorProto.FLOAT)
    result.graph.node.extend(state.nodes)
    for value in source.graph.output:
        result.graph.output.append(_as_float(value, _QUANTIZED))
    _finish(source, result)
    return result


def teacher_forced(model: onnx.ModelProto, linears: Sequence[Linear]) -> onnx.ModelProto:
    """Return a simulation of some linears alone, each fed by a graph input of its own.

    Inputs, FP32 [..., K]: `NODE:x` for every quantizer NODE of the linears (for a linear without one its
    MatMul), rounded to BF16 where the graph does not compute it in FP32. Outputs, FP32: every quantizer's
    codes [..., K] as E2M1 or E4M3 values and, in NVFP4, its block scales [..., K / 16], then every linear's
    product [..., N] with branch and bias, which is not rounded to BF16 while its operands are. The factors of slots for
    LoRAs stay inputs.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes, types = {node.name: node for node in copy.graph.node}, element_types(model)
    inputs, codes = {}, {}
    for linear in linears:
        head = linear.head
        if head not in inputs:
            inputs[head] = f"{head}:x"
            kind = TensorProto.FLOAT if types[linear.input] == TensorProto.FLOAT else TensorProto.BFLOAT16
            copy.graph.input.append(helper.make_tensor_value_info(inputs[head], kind, None))
        for name in linear.entries:
            nodes[name].input[0] = inputs[head]
        if linear.quantizer:
            given = (linear.quantizer.codes, linear.quantizer.block_scales)
            codes.update(dict.fromkeys(name for name in given if name))
    exact = {name for linear in linears for name in linear.computing}
    factors = (factor for linear in linears if linear.slot is not None for factor in linear.slot.factors)
    entering = dict.fromkeys((*inputs.values(), *factors))
    piece = cut(copy, {name: name for name in entering}, [*codes, *(linear.output for linear in linears)])
    return simulate(piece, exact=exact)


def _without_activation_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which every dequantized activation is the activation itself."""
    graph, types = Graph(model), element_types(model)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type in _DEQUANTIZERS and (source := _quantized_by(graph, node)):
            bypass = helper.make_node("Cast", [source], node.output, node.name, to=types[node.output[0]])
            node.CopyFrom(bypass)
    return cut(copy, {value.name: value.name for value in copy.graph.input}, [v.name for v in copy.graph.output])


def _quantized_by(graph: Graph, dequantize: NodeProto) -> str | None:
    """Return the activation whose codes, FP4 or FP8, a node dequantizes; None for weights and block scales."""
    above = graph.producer.get(dequantize.input[0])
    if above is not None and above.op_type == "QuantizeLinear":
        return str(above.input[0])
    quantizer = graph.quantizer(dequantize.output[0])
    return quantizer.input if quantizer and dequantize.input[0] == quantizer.codes else None


def _inputs(source: onnx.ModelProto, result: onnx.ModelProto, state: _Rewrite) -> None:
    for value in source.graph.input:
        result.graph.input.append(_as_float(value))
        if state.types[value.name] == TensorProto.BFLOAT16 and state.round_to_bfloat16:
            state.renamed[value.name] = f"{value.name}/rounded"
            state.round(value.name, state.renamed[value.name])


def _initializers(source: onnx.ModelProto, result: onnx.ModelProto, state: _Rewrite) -> None:
    for tensor in source.graph.initializer:
        result.graph.initializer.add().CopyFrom(tensor)
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            state.weights.add(tensor.name)
        if tensor.data_type == TensorProto.BFLOAT16:
            state.renamed[tensor.name] = f"{tensor.name}/as_float"
            state.cast(tensor.name, state.renamed[tensor.name], TensorProto.FLOAT)


def _as_float(value: onnx.ValueInfoProto, others: Collection[int] = _SMALL_FLOATS) -> onnx.ValueInfoProto:
    """Return a graph input or output whose BF16 type, or another of some, became FP32."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    tensor = copy.type.tensor_type
    if tensor.elem_type in (TensorProto.BFLOAT16, *others):
        tensor.elem_type = TensorProto.FLOAT
    return copy


def _node(node: NodeProto, state: _Rewrite) -> None:
    """Append what stands for one node of the deployable graph."""
    for new in _translated(node, state):
        copy = NodeProto()
        copy.CopyFrom(new)
        copy.input[:] = [state.renamed.get(name, name) for name in new.input]
        copy.output[:] = [state.renamed.get(name, name) for name in new.output]
        rounds = state.round_to_bfloat16 and node.name not in state.exact and node.op_type not in _MOVES
        rounded = [name for name in copy.output if rounds and state.types.get(name) == TensorProto.BFLOAT16]
        copy.output[:] = [f"{name}/unrounded" if name in rounded else name for name in copy.output]
        state.nodes.append(copy)
        for name in rounded:
            state.round(f"{name}/unrounded", name)


def _translated(node: NodeProto, state: _Rewrite) -> Iterator[NodeProto]:
    if node.op_type == "DequantizeLinear" and state.types[node.input[0]] in _SMALL_FLOATS:
        yield from _dequantize(node, state)
        return
    if node.domain == library.TRT_DOMAIN and node.op_type not in _TRT_OPERATORS:
        known = ", ".join(_TRT_OPERATORS)
        raise BadGraph(f"node {node.name} is trt::{node.op_type}; expected {known} only: export the graph again")
    copy = NodeProto()
    copy.CopyFrom(node)
    for attribute in copy.attribute:
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(attribute.t).astype("float32")
            attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
    if copy.op_type == "Attention" and len(copy.input) > 3 and copy.input[3]:
        yield from _expand_mask(copy)
    yield copy


def _expand_mask(attention: NodeProto) -> Iterator[NodeProto]:
    """Give an attention's mask a row for each query: ONNX Runtime does not take one row for all, as ONNX does."""
    query, mask = attention.input[0], attention.input[3]
    rows, shape, expanded = (f"{attention.name}/mask_{part}" for part in ("rows", "shape", "expanded"))
    yield helper.make_node("Constant", [], [f"{shape}/1"], f"{shape}/1", value_ints=[1])
    yield helper.make_node("Shape", [query], [rows], rows, start=-2, end=-1)
    yield helper.make_node("Concat", [rows, f"{shape}/1"], [shape], shape, axis=0)
    yield helper.make_node("Expand", [mask, shape], [expanded], expanded)
    attention.input[3] = expanded


def _dequantize(node: NodeProto, state: _Rewrite) -> Iterator[NodeProto]:
    """Yield the nodes for a DequantizeLinear of FP4 or FP8 values, all of them FP32 to FP32."""
    attributes = attributes_of(node)
    block_size, axis = attributes.get("block_size", 0), attributes.get("axis", 1)
    values, scale = node.input[0], node.input[1]
    if len(node.input) > 2 and node.input[2]:
        raise BadGraph(f"node {node.name} has a zero point; FP4 and FP8 have none: export the graph again")
    if not block_size:
        # One scale for the tensor. The node stays a DequantizeLinear, which ONNX Runtime does not fold.
        yield helper.make_node("DequantizeLinear", [values, scale], node.output, node.name)
        return
    if axis not in (-1, 1) or (axis == 1 and values not in state.weights):
        raise BadGraph(f"node {node.name} dequantizes along axis {axis}; expected -1: export the graph again")
    kind = "FP4WeightDequantize" if values in state.weights else "FP4Dequantize"
    yield helper.make_node(
        kind,
        [values, scale],
        node.output,
        node.name,
        domain=library.SIMULATION_DOMAIN,
        block_size=block_size,
        output_dtype=TensorProto.FLOAT,
    )


def _finish(source: onnx.ModelProto, result: onnx.ModelProto) -> None:
    """Give the result its operator sets, functions and metadata; value_info, with its FP4 types, stays out."""
    result.functions.extend(function for name in FORMATS for function in graph_format(name).functions())
    opsets = {entry.domain: entry.version for entry in source.opset_import}
    opsets.update({library.TRT_DOMAIN: 1, library.SIMULATION_DOMAIN: 1, library.MICROSOFT_DOMAIN: 1})
    result.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in opsets.items())
    result.metadata_props.extend(source.metadata_props)
