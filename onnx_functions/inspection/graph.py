"""What an ONNX graph is, by its own pattern: every product with a constant matrix is a linear, promised or not.

Those in the bodies of If, Loop and Scan count too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import NodeProto

from fp4trt.errors import BadGraph
from fp4trt.file_kind import shortened
from fp4trt.number_formats import FORMATS, NVFP4
from onnx_functions.graph.branches import described_branches, is_factor
from onnx_functions.graph.element_types import attributes_of, integer, opset_of
from onnx_functions.graph.external_data import BadSpan, load_graph, nbytes_of, type_name
from onnx_functions.graph.index import PRODUCTS, QUANTIZED, name_of
from onnx_functions.graph.linears import declared_groups, declared_slots, promised_linears
from onnx_functions.graph.stored_linears import FORMAT_OF, StoredLinear, compare, coverage
from onnx_functions.graph.subgraphs import lay_open
from onnx_functions.inspection import attention
from onnx_functions.library import ACTIVATION_PLACEHOLDER, WEIGHT_PLACEHOLDER
from onnx_functions.linting.operators import form_faults
from onnx_functions.linting.subject import Subject, WeightChain

__all__ = ["describe_graph"]

_HOLDERS: Final = ("If", "Loop", "Scan", "SequenceMap")
_SUFFIX: Final = re.compile(r"/(MatMul|Gemm)(_\d+)?$")


@dataclass(frozen=True)
class _Found:
    """A linear of the graph, its activation quantizer and its weight's global scale ("" without them).

    In FP8 linears share the quantizer alone: each weight reads the scale of its own name, equal or not.
    """

    linear: StoredLinear
    quantizer: str
    global_scale: str


def describe_graph(path: Path) -> dict[str, Any]:
    """Return what an ONNX file is, as JSON holds it; its weights may be missing, its metadata too.

    Raises:
        BadGraph: it cannot be read, its external data make no sense, or its promise is not JSON of lists.
    """
    loaded = load_graph(path)
    version = opset_of(loaded)
    lay_open(loaded.graph)
    for node in loaded.graph.node:
        if node.op_type not in _HOLDERS:  # which have lost their bodies
            for fault in form_faults(node, version):
                raise BadGraph(f"{path}: node {name_of(node)}: {fault}; export the graph again")
    subject = Subject(path, loaded)
    model, metadata = subject.model, subject.metadata
    present, missing = _files(subject)
    sizes = {name: nbytes_of(tensor) for name, tensor in subject.constants.items()}
    found = list(_linears(subject, sizes))
    groups = _groups(found)
    covered = coverage([item.linear for item in found], groups)
    return {
        "kind": "onnx",
        "path": str(path.resolve()),
        "family": metadata.get("fp4trt.family"),
        "recipe": metadata.get("fp4trt.recipe"),
        "scale_dtype": metadata.get("fp4trt.scale_dtype") if covered["fp4_linears"] else None,
        "producer": model.producer_name or None,
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "nodes": len(model.graph.node),
        "bytes": sum(sizes.values()),
        "external_files": present,
        "missing_files": missing,
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "activation_quantizers": len(subject.activations) + len(subject.fp8_quantizers),
        "placeholders": _placeholders(subject),
        "promise": _promise(subject, found, groups),
        "attention": attention.of_graph(subject),
        **covered,
        "branches": described_branches({name: (subject.dims(name), size) for name, size in sizes.items()}),
        "lora": _slots(model),
    }


def _slots(model: onnx.ModelProto) -> dict[str, int] | None:
    """Return what slots for LoRAs a graph says that it has, as JSON; None without any."""
    slots = declared_slots(model)
    return None if slots is None else {"linears": sum(map(len, slots.groups)), "max_rank": slots.max_rank}


def _files(subject: Subject) -> tuple[list[str], list[str]]:
    """Return the files that hold external data, and those that should and are not there."""
    present, missing = set(), set()
    for name, span in subject.spans.items():
        if isinstance(span, BadSpan):
            if span.fault != "file":
                raise span
            missing |= {shortened(e.value) for e in subject.constants[name].external_data if e.key == "location"}
        elif span is not None:
            present.add(span.file.name)
    return sorted(present), sorted(missing)


def _linears(subject: Subject, sizes: Mapping[str, int]) -> Iterator[_Found]:
    chains = {chain.codes: chain for chain in subject.weights}
    taken: set[str] = set()
    for node in subject.model.graph.node:
        if node.op_type not in PRODUCTS or len(node.input) < 2:
            continue
        for index in (1, 0):
            source, marked = _weight(subject, node.input[index])
            if is_factor(subject.owner(source) if source else ""):
                break  # of a low-rank branch, which is not a linear of its own
            read = subject.shapes.of(node.input[index]) if source else None
            if read is not None and len(read) == 2 and read[0] is not None and read[1] is not None:
                path = _path(node, source, taken)
                taken.add(path)
                as_stored = integer(attributes_of(node), "transB" if index else "transA", 0) == index
                shape = (read[0], read[1]) if as_stored else (read[1], read[0])
                activation = node.input[1 - index]
                quantizer = subject.any_quantizer_of(activation)
                kind = _format(subject, node.input[index], source, chains.get(source), quantizer is not None, marked)
                chain = chains.get(source)
                nbytes = sizes[source] + _scale_bytes(subject, node.input[index], chain, sizes)
                reads = quantizer.output[0] if quantizer is not None else ""
                scale = chain.global_scale if chain else "each its own" if kind in FORMATS else ""
                yield _Found(StoredLinear(path, kind, shape, nbytes), reads, scale)
                break


def _weight(subject: Subject, tensor: str) -> tuple[str, bool]:
    """Return the constant behind a weight ("" for none), and whether it is marked for FP4."""
    source, passed = subject.graph.to_stored(tensor), subject.graph.chain(tensor, QUANTIZED)
    return source if source in subject.constants else "", any(node.op_type == WEIGHT_PLACEHOLDER for node in passed)


def _scale_bytes(subject: Subject, weight: str, chain: WeightChain | None, sizes: Mapping[str, int]) -> int:
    """Return the bytes of the scales that a weight's codes are read under, but for NVFP4's global one."""
    if chain is not None:
        return sizes.get(chain.block_scales, 0)
    dequantizers = {kind.dequantizer[1] for kind in FORMATS.values()}
    passed = [node for node in subject.graph.chain(weight, QUANTIZED) if node.op_type in dequantizers]
    return sum(sizes.get(name, 0) for name in {name for node in passed for name in node.input[1:2]})


def _path(node: NodeProto, weight: str, taken: set[str]) -> str:
    """Return a linear's module path, as far as names tell it; TorchScript writes /a/b/MatMul for a.b."""
    if _SUFFIX.search(node.name):
        path = _SUFFIX.sub("", node.name)
        path = path.strip("/").replace("/", ".") if path.startswith("/") else path
    else:
        path = node.name or weight.removesuffix(".weight")
    if path and path not in taken:
        return path
    return node.name if node.name and node.name not in taken else node.output[0]


def _format(
    subject: Subject, weight: str, source: str, chain: WeightChain | None, quantized: bool, marked: bool
) -> str:
    name = type_name(subject.constants[source].data_type)
    kind = subject.graph.weight_format(weight) or FORMAT_OF.get(name, name.lower())
    if marked:
        return f"{kind} marked"
    if kind != NVFP4.name:
        return f"{kind} weight-only" if kind in FORMATS and not quantized else kind
    if chain is None or chain.scales is None:
        return "fp4"
    return kind if quantized else "nvfp4 weight-only"


def _groups(found: Iterable[_Found]) -> list[list[str]]:
    """Return the linears by the quantizer's codes and the global scale that they read; TensorRT can merge a group."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in found:
        if item.quantizer and item.global_scale:
            groups.setdefault((item.quantizer, item.global_scale), []).append(item.linear.path)
    return list(groups.values())


def _placeholders(subject: Subject) -> dict[str, Any] | None:
    """Return how many nodes still wait to become FP4, and the command that makes them so; None without any."""
    operators = [node.op_type for node in subject.model.graph.node]
    weights, activations = operators.count(WEIGHT_PLACEHOLDER), operators.count(ACTIVATION_PLACEHOLDER)
    if not weights and not activations:
        return None
    following = f"fp4trt export {subject.path.name} -o ours" if weights else None
    return {"weights": weights, "activations": activations, "next": following}


def _promise(subject: Subject, found: Iterable[_Found], groups: Iterable[Iterable[str]]) -> dict[str, Any] | None:
    """Return what the metadata promise against what the chains are; None for a graph that promises nothing."""
    declared = [group for group in declared_groups(subject.model) if len(group) > 1]
    if "fp4trt.linears" not in subject.metadata:
        return None
    result = compare(promised_linears(subject.model), {item.linear.path: item.linear.format for item in found})
    real = [set(group) for group in groups]
    return {**result, "lost_groups": [group for group in declared if set(group) not in real]}


def _value(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "type": type_name(tensor.elem_type), "shape": shape}
