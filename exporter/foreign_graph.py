"""Read a third-party graph, and refuse what cannot become FP4 before anything of it is changed."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import onnx_ir as ir

from exporter.naming import name_of
from exporter.quiet import quiet
from exporter.trt_ops import ACTIVATION_PLACEHOLDER, DOMAIN, QUANTIZER, WEIGHT_PLACEHOLDER
from fp4trt.errors import BadGraph, NoPlaceholders
from fp4trt.file_kind import is_file, shortened, what_it_is, what_it_lacks
from fp4trt.linked_files import real_file
from onnx_functions.graph.external_data import BadSpan, load_graph, span_of

__all__ = [
    "checked_files",
    "load_foreign",
    "refuse_blocks_across_products",
    "refuse_untyped",
    "refuse_what_stays",
]

_ALIAS: Final = "ai.onnx"
"""Another name of the standard's domain, which is called ""."""

_ARITY: Final = {WEIGHT_PLACEHOLDER: (1, 1), QUANTIZER: (2, 2)}
"""Inputs and outputs of TensorRT's operators that are rewritten."""


def load_foreign(path: Path) -> ir.Model:
    """Return a graph whose nodes come in order.

    Raises:
        BadGraph: it is none.
    """
    if not path.is_file():
        raise BadGraph(f"{path} {what_it_lacks(path)}; expected an ONNX file")
    try:
        with quiet("onnx_ir"):  # it prints what it finds odd; the one line that the user gets says what is wrong
            model = ir.load(path)
    except Exception as refusal:  # protobuf and onnx_ir raise many types, by version
        error: BaseException = refusal
        while error.__cause__ is not None:  # onnx_ir says first in which function it was
            error = error.__cause__
        if fault := _misplaced(path):
            raise BadGraph(f"{path}: {fault}") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadGraph(f"{path} {what_it_is(path) or f'is not an ONNX model ({reason}); export it again'}") from None
    if not len(model.graph):
        raise BadGraph(f"{path} {what_it_is(path) or 'is not an ONNX model: it has no node; export it again'}")
    _name_standard(model)
    made: set[ir.Node] = set()
    for node in model.graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if value is not None and producer is not None and producer not in made:
                raise BadGraph(f"{name_of(node)} reads {value.name} before it is computed; export the graph again")
        made.add(node)
    return model


def _misplaced(path: Path) -> str:
    """Return which external data of a graph are not where they have to be; "" where all are, or it is not a graph."""
    try:
        tensors = load_graph(path).graph.initializer
        for tensor in tensors:
            span_of(tensor, path.parent)
    except BadSpan as fault:
        return str(fault)
    except (ValueError, OSError):
        return ""
    return ""


def _name_standard(model: ir.Model) -> None:
    """Call the standard's domain "" where a graph calls it by its alias ai.onnx.

    Raises:
        BadGraph: it declares two versions of the one domain.
    """
    imports = model.opset_imports
    version = imports.pop(_ALIAS, None)
    if version is not None and imports.setdefault("", version) != version:
        raise BadGraph(
            f"the graph declares opset {imports['']} and, under the name {_ALIAS}, {version}; both are the standard's: "
            "export the graph again with one of them"
        )
    nodes = [*model.graph.all_nodes(), *(node for inner in model.functions.values() for node in inner.all_nodes())]
    for node in nodes:
        if node.domain == _ALIAS:
            node.domain = ""


def refuse_untyped(graph: ir.Graph) -> None:
    """Refuse a graph that does not say of each input and output which type and shape it has.

    Raises:
        BadGraph: naming the first.
    """
    inputs = [value for value in graph.inputs if not value.is_initializer()]
    for what, values in (("input", inputs), ("output", graph.outputs)):
        for value in values:
            untyped = value.type is None or value.dtype in (None, ir.DataType.UNDEFINED)
            if untyped or (isinstance(value.type, ir.TensorType) and value.shape is None):
                lacks = "type" if untyped else "shape"
                raise BadGraph(f"the {what} {value.name} has no {lacks}; export the graph again with its {lacks}")


def checked_files(model: ir.Model) -> set[Path]:
    """Return the files of a model's external data, having checked that every tensor has its bytes, there or inline.

    Tensors in files that are links, as in a hub's cache, are replaced by those of the files that the links lead to,
    because onnx_ir reads no links.

    Raises:
        BadGraph: naming the tensor whose bytes are missing.
    """
    files = set()
    for tensor, replace in _tensors(model):
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise BadGraph(f"{tensor.name} has no element type; export the graph again")
        if isinstance(tensor, ir.ExternalTensor):
            file = _checked_file(tensor)
            files.add(file)
            if Path(tensor.path).is_symlink() or file.stat().st_nlink > 1 or file != Path(tensor.path).absolute():
                replace(_in_file(tensor, file))
        elif tensor.dtype != ir.DataType.STRING:
            _check_length(tensor, len(tensor.tobytes()), "data")
    return files


def _in_file(tensor: ir.ExternalTensor, file: Path) -> ir.ExternalTensor:
    """Return external data as those of a file that was checked; without a base folder onnx_ir does not check again."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.ExternalTensor(
        str(file), tensor.offset, tensor.length, tensor.dtype, shape=shape, name=str(tensor.name), base_dir=""
    )


def _checked_file(tensor: ir.ExternalTensor) -> Path:
    """Return the file of external data, links followed, which holds as many bytes as the tensor's shape needs."""
    place, begin, length = Path(tensor.path), tensor.offset or 0, tensor.nbytes
    if not is_file(place):
        raise BadGraph(
            f"{tensor.name} needs {length} bytes from byte {begin} of {shortened(str(tensor.location))!r}, which "
            f"{what_it_lacks(place)}; copy the graph again with its data"
        )
    outside = not Path(os.path.normpath(place)).is_relative_to(os.path.normpath(tensor.base_dir))
    file = None if outside else real_file(Path(tensor.base_dir), Path(tensor.location))
    if outside or Path(tensor.location).is_absolute():
        raise BadGraph(f"{tensor.name} lies at {tensor.location}; expected a path inside the graph's folder")
    if file is None:
        raise BadGraph(
            f"{tensor.name} lies in {tensor.location}, a link out of the graph's folder that is not one of a hub's "
            "cache (snapshots/ to blobs/), and is not followed; copy the file in its place"
        )
    _check_length(tensor, length if tensor.length is None else tensor.length, "external data")
    size = file.stat().st_size
    if begin + length > size:
        found = what_it_is(file) if size < 1024 else None
        raise BadGraph(
            f"{tensor.name} needs {length} bytes from byte {begin} of {place}, which {found or f'has {size} bytes'}; "
            "copy the graph again with its data"
        )
    return file


def _check_length(tensor: ir.TensorProtocol, found: int, what: str) -> None:
    if found != tensor.nbytes:
        needs = f"its shape {list(tensor.shape.numpy())} needs {tensor.nbytes}"
        raise BadGraph(f"{tensor.name} has {found} bytes of {what}, {needs}; export the graph again")


def refuse_what_stays(model: ir.Model) -> None:
    """Refuse a graph without placeholders, or with some that cannot be replaced.

    Raises:
        NoPlaceholders: nothing is marked.
        BadGraph: naming the node.
    """
    outer = [node for node in model.graph.all_nodes() if node.op_type.startswith("TRT_FP4")]
    inner = [n for f in model.functions.values() for n in f.all_nodes() if n.op_type.startswith("TRT_FP4")]
    for node in (*outer, *inner):
        _refuse_operator(node)
        if node.graph is not model.graph:
            what = "marks a weight" if node.op_type == WEIGHT_PLACEHOLDER else "quantizes"
            raise BadGraph(f"{name_of(node)} {what} inside a subgraph or function; inline it and export again")
    if not any(node.op_type == WEIGHT_PLACEHOLDER for node in outer):
        raise NoPlaceholders(
            f"the graph has no {WEIGHT_PLACEHOLDER} node, so no weight is marked for FP4; "
            "quantize the model with ModelOpt before its ONNX export"
        )
    if model.functions:
        raise BadGraph("the graph has local functions, which TensorRT cannot call twice; inline them and export again")


def _refuse_operator(node: ir.Node) -> None:
    """Refuse an FP4 operator that TensorRT would not know."""
    if node.op_type == ACTIVATION_PLACEHOLDER:
        raise BadGraph(f"{name_of(node)} is a {node.op_type}, which no graph may hold; expected {QUANTIZER}")
    if node.op_type not in _ARITY:
        return
    if node.domain != DOMAIN:
        raise BadGraph(f"{name_of(node)} is a {node.op_type} in the domain {node.domain!r}; expected {DOMAIN!r}")
    given, wanted = (len(node.inputs), len(node.outputs)), _ARITY[node.op_type]
    if given != wanted or None in node.inputs:
        raise BadGraph(
            f"{name_of(node)}, a {node.op_type}, has {given[0]} inputs and {given[1]} outputs; "
            f"expected {wanted[0]} and {wanted[1]}, all of them given: export the graph again"
        )


def refuse_blocks_across_products(graph: ir.Graph) -> None:
    """Refuse a weight [K, N] that a product reads as it is: its blocks would run along N.

    TensorRT builds that without a word, in 16 bit.
    """
    for node in graph:
        if node.op_type != WEIGHT_PLACEHOLDER:
            continue
        for user, index in node.outputs[0].uses():
            turned = user.op_type == "Gemm" and "transB" in user.attributes and user.attributes["transB"].as_int()
            if user.op_type in ("MatMul", "Gemm") and index == 1 and not turned:
                raise BadGraph(
                    f"{name_of(user)} reads the weight of {name_of(node)} as [K, N], so its blocks lie across the sum "
                    "and TensorRT would drop FP4; mark the weight as [N, K] and transpose it afterwards, or pass "
                    "--allow-slow"
                )


Replace = Callable[[ir.TensorProtocol], None]


def _tensors(model: ir.Model) -> Iterator[tuple[ir.TensorProtocol, Replace]]:
    """Yield every tensor that a model stores, those of its subgraphs and functions too, and what replaces each."""
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value, functools.partial(setattr, value, "const_value")
    nodes = [*model.graph.all_nodes(), *(node for inner in model.functions.values() for node in inner.all_nodes())]
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor(), functools.partial(_set_tensor, node, name)


def _set_tensor(node: ir.Node, name: str, tensor: ir.TensorProtocol) -> None:
    node.attributes[name] = ir.AttrTensor(name, tensor)
