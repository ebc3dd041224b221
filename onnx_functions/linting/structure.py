"""Rules for the graph as such: operators, names, order, the declared opset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import onnx
from onnx import GraphProto, NodeProto, defs

from onnx_functions.graph.bodies import bodies_of, outer_reads
from onnx_functions.graph.element_types import attributes_of, integer
from onnx_functions.graph.index import name_of
from onnx_functions.library import ACTIVATION_PLACEHOLDER, TRT_DOMAIN, WEIGHT_PLACEHOLDER
from onnx_functions.linting.opset import OLDEST, OPSET, differing_nodes, opset_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES", "tensor_order"]


@rule("opset", "wrong", "export again at opset 23")
def opset(subject: Subject) -> Iterator[Hit]:
    """An FP4 graph at an opset below 23 with operators whose meaning has changed since, or below 19 at all.

    TensorRT-RTX reads the declaration and judges by its own table: accepted. A graph without FP4 and without blocks may
    have any opset. Source: the ONNX changelog.
    """
    version = opset_of(subject.model)
    if version < OLDEST and _needs_opset(subject):
        found = f"the declared opset is {version}; expected {OPSET} ({OLDEST} to 22 where that means the same)"
        yield Hit(found, tensor=_IMPORT)
    elif version < OPSET and _needs_opset(subject):
        for node in differing_nodes(subject.model):
            found = f"the declared opset is {version}, and a {node.op_type} means something else at {OPSET}"
            yield Hit(found, name_of(node))


@rule("opset-import", "wrong", "import the standard's operators once, at opset 23: export again")
def opset_import(subject: Subject) -> Iterator[Hit]:
    """A domain of operators is imported at one opset, the standard's always, and at one that exists.

    Exists by the onnx that is installed here. Source: the ONNX specification; measured: two imports are accepted.
    """
    found: dict[str, list[int]] = {}
    for entry in subject.model.opset_import:
        found.setdefault(entry.domain or _STANDARD, []).append(entry.version)
    newest = defs.onnx_opset_version()
    for domain, versions in found.items():
        if len(set(versions)) > 1:
            yield Hit(f"the domain {domain} is imported at the opsets {versions}", tensor=_IMPORT)
    if _STANDARD not in found and any(node.domain in ("", _STANDARD) for node in subject.model.graph.node):
        yield Hit("the standard's operators are not imported", tensor=_IMPORT)
    elif (version := opset_of(subject.model)) > newest:
        yield Hit(f"the declared opset is {version}; the newest that is known here is {newest}", tensor=_IMPORT)


@rule("opset-declared", "warning", "nothing to do for TensorRT-RTX; onnx_functions.linting.normalise writes 23")
def opset_declared(subject: Subject) -> Iterator[Hit]:
    """An FP4 graph at opset 19 to 22 whose every operator means the same at 23 is read as one of 23.

    FP4 entered the standard at 23, so strict readers refuse the graph; TensorRT-RTX builds the same engine from it.
    Source: measured; the ONNX changelog.
    """
    version = opset_of(subject.model)
    if OLDEST <= version < OPSET and _needs_opset(subject) and not differing_nodes(subject.model):
        found = f"the declared opset is {version}; read as {OPSET}, which means the same for this graph"
        yield Hit(found, tensor=_IMPORT)


@rule("no-fp4", "warning", "quantize it with fp4trt, or mark its weights for FP4, if it was to run in FP4")
def no_fp4(subject: Subject) -> Iterator[Hit]:
    """A graph without any FP4 tensor or quantizer: what the lint is for is not in it.

    One that promises to be in 16 bit is not told. Source: legal; TensorRT-RTX builds it in its own types.
    """
    if not subject.has_fp4 and not subject.promises:
        graph = subject.model.graph
        yield Hit(f"no FP4 in this graph of {len(graph.node)} nodes", tensor=graph.name or "(the graph)")


@rule("trt-domain", "wrong", 'put the operator into the domain "trt", and import that')
def trt_domain(subject: Subject) -> Iterator[Hit]:
    """TensorRT's operators belong to the domain "trt": in another one they are no standard's, yet built.

    Source: measured; no other runtime, and no function that says what the operator means, finds it there.
    """
    imported = {entry.domain for entry in subject.model.opset_import}
    for node in subject.model.graph.node:
        if node.op_type.startswith("TRT_") and node.domain != TRT_DOMAIN:
            yield Hit(f"{node.op_type} is in the domain {node.domain!r}; expected 'trt'", name_of(node))
        elif node.domain == TRT_DOMAIN and TRT_DOMAIN not in imported:
            yield Hit("the model does not import the domain 'trt'", name_of(node))


@rule("placeholder", "wrong", "write codes and scales in two DequantizeLinear: export the graph with fp4trt")
def placeholder(subject: Subject) -> Iterator[Hit]:
    """A TRT_FP4QDQ is a weight that was to become FP4 and did not: an exporter's last step is missing.

    Source: measured: refused by the parser.
    """
    for node in subject.model.graph.node:
        if node.op_type in (WEIGHT_PLACEHOLDER, ACTIVATION_PLACEHOLDER):
            yield Hit(f"a {node.op_type} is left in the graph", name_of(node), node.input[0] if node.input else "")


@rule("duplicate-node-name", "wrong", "give each node a name of its own")
def duplicate_node_name(subject: Subject) -> Iterator[Hit]:
    """Two nodes of one name: the engine's layers can no longer be matched with the linears.

    Source: measured: accepted, and one of two products is reported as lost.
    """
    seen = set()
    for node in subject.model.graph.node:
        if node.name and node.name in seen:
            yield Hit(f"another node has this name (this one is a {node.op_type})", node.name)
        seen.add(node.name)


@rule("duplicate-tensor-name", "wrong", "give each tensor a name of its own")
def duplicate_tensor_name(subject: Subject) -> Iterator[Hit]:
    """Two initializers of one name, or two inputs: which of them is read depends on the reader.

    Source: the ONNX specification; refused by onnx's checker.
    """
    graph = subject.model.graph
    for values, what in ((graph.initializer, "initializers"), (graph.input, "inputs")):
        for name, count in Counter(value.name for value in values).items():
            if count > 1:
                yield Hit(f"{count} {what} have this name", tensor=name)


@rule("tensor-order", "wrong", "export again; nothing else of the graph was judged")
def tensor_order(subject: Subject) -> Iterator[Hit]:
    """A node that reads what no earlier node, input or initializer gives, or gives what exists already.

    No other rule can follow the wires of such a graph, so none is asked. Source: the ONNX specification; refused by
    the parser.
    """
    yield from _out_of_order(subject.model.graph, set())


def _out_of_order(graph: GraphProto, outside: set[str]) -> Iterator[Hit]:
    """Yield the hits of a graph, or of a body that sees the tensors `outside`."""
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in own and name not in outside:
                yield Hit(f"reads {name}, which nothing before it gives", name_of(node), name)
        for body in bodies_of(node):
            yield from _out_of_order(body, own | outside)
        for name in node.output:
            if name and name in own:
                yield Hit(f"gives {name}, which exists already", name_of(node), name)
            own.add(name)
    for index, value in enumerate(graph.output):
        if value.name not in own and value.name not in outside:
            yield Hit("nothing gives this output", tensor=value.name or f"(output {index} without a name)")


@rule(
    "initializer-input", "warning", "take the initializers out of the graph's inputs: onnx_functions.linting.normalise"
)
def initializer_input(subject: Subject) -> Iterator[Hit]:
    """An initializer that is a graph input too is a default that a caller may replace; TensorRT-RTX takes a constant.

    Source: measured; the ONNX specification.
    """
    for value in subject.model.graph.input:
        if value.name in subject.graph.initializers:
            yield Hit("the initializer is listed among the graph's inputs", tensor=value.name)


@rule("dead-initializer", "warning", "remove it, or find out what should read it")
def dead_initializer(subject: Subject) -> Iterator[Hit]:
    """An initializer that nothing reads is dead weight, or the sign of a crossed wire.

    Source: TensorRT-RTX drops it.
    """
    read = {value.name for value in subject.model.graph.output}
    read.update(name for node in subject.model.graph.node for name in outer_reads(node))
    for name in subject.graph.initializers:
        if name not in read:
            yield Hit("nothing reads this initializer", tensor=name)


@rule("fp8-attention", "slow", "decompose the Attention into MatMul, Softmax and MatMul with Q/DQ around them")
def fp8_attention(subject: Subject) -> Iterator[Hit]:
    """An Attention operator whose inputs are dequantized from FP8 runs in 16 bit all the same.

    Source: measured.
    """
    for node in subject.model.graph.node:
        if node.op_type != "Attention":
            continue
        for name in node.input[:3]:
            above = subject.graph.producer.get(subject.graph.through_moves(name))
            if above is not None and above.op_type == "DequantizeLinear":
                yield Hit(f"reads {name}, which {name_of(above)} dequantizes", name_of(node), name)


@rule("mxfp8-block-size", "wrong", "MXFP8 has blocks of 32: quantize again, and declare 32")
def mxfp8_block_size(subject: Subject) -> Iterator[Hit]:
    """MXFP8 has one scale for 32 elements: another block size is accepted and gives other numbers.

    Source: measured.
    """
    for node in _mxfp8(subject):
        size = integer(attributes_of(node), "block_size", 32)
        if size != 32:
            yield Hit(f"block_size is {size}; expected 32", name_of(node))
            continue
        name, scales = (subject.constant(tensor) for tensor in (*node.input, "", "")[:2])
        if name and scales and subject.dims(name):
            rows, wanted = subject.dims(name), (*subject.dims(name)[:-1], subject.dims(name)[-1] // 32)
            if subject.dims(scales) != wanted:
                found = f"scales are {list(subject.dims(scales))}; expected {list(wanted)} for {list(rows)}"
                yield Hit(found, name_of(node), scales)


@rule("mxfp8-float-output", "wrong", "write output_dtype=BFLOAT16 and no Cast")
def mxfp8_float_output(subject: Subject) -> Iterator[Hit]:
    """TRT_MXFP8DequantizeLinear with FP32 output and a Cast behind, on activation and weight, crashes the builder.

    Source: measured: a segmentation fault; on the weight alone it builds, in 16 bit.
    """
    for node in _mxfp8(subject):
        if integer(attributes_of(node), "output_dtype", 0) == onnx.TensorProto.FLOAT and any(
            reader.op_type == "Cast" for reader in subject.graph.consumers.get(node.output[0], ())
        ):
            yield Hit("output_dtype is FLOAT, and a Cast reads it", name_of(node))


@rule("mxfp8-storage", "warning", "take NVFP4 or per-tensor FP8 for speed")
def mxfp8_storage(subject: Subject) -> Iterator[Hit]:
    """MXFP8 saves storage only: no form that was tried got a block-scaled GEMM.

    Source: measured with TensorRT-RTX; TensorRT on SM100 and SM103 was not at hand.
    """
    for node in _mxfp8(subject):
        if subject.constant(node.input[0]):
            yield Hit("the weight is unpacked to 16 bit", name_of(node), node.input[0])


RULES = (
    opset,
    opset_import,
    opset_declared,
    no_fp4,
    trt_domain,
    placeholder,
    duplicate_node_name,
    duplicate_tensor_name,
    tensor_order,
    initializer_input,
    dead_initializer,
    fp8_attention,
    mxfp8_block_size,
    mxfp8_float_output,
    mxfp8_storage,
)

_STANDARD: Final = "ai.onnx"
_IMPORT: Final = "opset_import"
"""What findings about the declared opset name."""


def _needs_opset(subject: Subject) -> bool:
    """Whether a graph holds what an older opset has not: FP4, or Q/DQ in blocks."""
    return subject.has_fp4 or any(
        node.op_type in ("DequantizeLinear", "QuantizeLinear") and integer(attributes_of(node), "block_size", 0)
        for node in subject.model.graph.node
    )


def _mxfp8(subject: Subject) -> Iterator[NodeProto]:
    for node in subject.model.graph.node:
        if node.op_type == "TRT_MXFP8DequantizeLinear":
            yield node
