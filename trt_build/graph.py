"""What a build must know of an ONNX graph: inputs, promises, formats, external bytes. No weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from trt_build.errors import BadModelError
from trt_build.profiles import InputShape

__all__ = ["ExternalRange", "Graph", "read_graph"]

_PRODUCT_SUFFIXES = ("/MatMul", "/Gemm")
_PASS_THROUGH = ("Cast", "Transpose", "Identity", "Reshape", "DequantizeLinear")


@dataclass(frozen=True)
class ExternalRange:
    """Bytes [offset, offset + length) of a file that an initializer points to."""

    tensor: str
    path: Path
    offset: int
    length: int


@dataclass(frozen=True)
class Graph:
    """A deployable ONNX graph without its external data."""

    path: Path
    model: onnx.ModelProto

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The model's metadata_props."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """Nodes by the name of each of their outputs."""
        return {output: node for node in self.model.graph.node for output in node.output}

    @cached_property
    def products(self) -> dict[str, onnx.NodeProto]:
        """Matrix products by the linear they belong to (the node's name without its "/MatMul")."""
        nodes = (node for node in self.model.graph.node if node.op_type in ("MatMul", "Gemm"))
        return {_linear_of(node.name): node for node in nodes if node.name}

    @cached_property
    def promised_fp4(self) -> tuple[str, ...]:
        """Linears that must run as FP4 GEMMs: the metadata's, else every product with an FP4 weight."""
        if "fp4trt.linears" in self.metadata:
            return tuple(self.declared("fp4trt.linears").get("nvfp4", ()))
        return tuple(path for path, node in self.products.items() if self._weight_is_fp4(node))

    @cached_property
    def other_linears(self) -> tuple[str, ...]:
        """Linears that the graph keeps in other formats."""
        if "fp4trt.linears" in self.metadata:
            declared: dict[str, list[str]] = self.declared("fp4trt.linears")
            return tuple(path for kind, paths in declared.items() if kind != "nvfp4" for path in paths)
        constant = (path for path, node in self.products.items() if self.stored(node.input[1]) is not None)
        return tuple(path for path in constant if path not in self.promised_fp4)

    @property
    def symbols(self) -> dict[str, dict[str, Any]]:
        """The metadata's symbolic dimensions; empty for a graph of other origin."""
        return self.declared("fp4trt.symbols") if "fp4trt.symbols" in self.metadata else {}

    @property
    def uses_fp4(self) -> bool:
        """Whether any weight or activation is FP4, used for a GEMM or only stored: SM89 refuses both."""
        return any(tensor.data_type == onnx.TensorProto.FLOAT4E2M1 for tensor in self.model.graph.initializer) or any(
            node.op_type == "TRT_FP4DynamicQuantize" for node in self.model.graph.node
        )

    @cached_property
    def input_shapes(self) -> dict[str, InputShape]:
        """Dimensions of the inputs that are not initializers."""
        return {
            value.name: tuple(_dimension(dimension) for dimension in value.type.tensor_type.shape.dim)
            for value in self.model.graph.input
            if value.name not in self.initializers
        }

    @cached_property
    def external_ranges(self) -> tuple[ExternalRange, ...]:
        """External byte ranges in graph order.

        Raises BadModelError where a file is missing or too short.
        """
        ranges = (
            _external_range(self.path.parent, tensor)
            for tensor in _tensors(self.model.graph)
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        )
        return tuple(ranges)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph file and of all external data: what the builder has to hold."""
        return self.path.stat().st_size + sum(piece.length for piece in self.external_ranges)

    def declared(self, key: str) -> Any:
        """Return a metadata entry that holds JSON."""
        try:
            return json.loads(self.metadata[key])
        except json.JSONDecodeError as error:
            raise BadModelError(f"{self.path}: metadata {key} is not JSON ({error}); export the graph again") from None

    def chain(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the casts, moves and dequantizations above a tensor, nearest first, then what computes."""
        nodes: list[onnx.NodeProto] = []
        while (node := self.producers.get(tensor)) is not None:
            nodes.append(node)
            if node.op_type not in _PASS_THROUGH:
                break
            tensor = node.input[0]
        return nodes

    def stored(self, tensor: str) -> onnx.TensorProto | None:
        """Return the initializer that a tensor is a cast, moved or dequantized form of."""
        nodes = self.chain(tensor)
        return self.initializers.get(nodes[-1].input[0] if nodes and nodes[-1].input else tensor)

    def _weight_is_fp4(self, product: onnx.NodeProto) -> bool:
        weight = self.stored(product.input[1])
        return weight is not None and weight.data_type == onnx.TensorProto.FLOAT4E2M1


def read_graph(path: Path) -> Graph:
    """Read `model.onnx`, or the one in a checkpoint directory, without its external data.

    Raises:
        BadModelError: no such file, or not an ONNX model.
    """
    if path.is_dir():
        path = path / "model.onnx"
        if not path.is_file():
            raise BadModelError(f"{path.parent} holds no model.onnx; write one with fp4trt export {path.parent}")
    if not path.is_file():
        raise BadModelError(f"{path} does not exist; give an ONNX file or a directory that holds model.onnx")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own DecodeError, which is not an exception class of onnx
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadModelError(f"{path} is not an ONNX model ({reason})") from None
    if not model.graph.node:
        raise BadModelError(f"{path} is not an ONNX model: it has no node")
    return Graph(path, model)


def _linear_of(node_name: str) -> str:
    for suffix in _PRODUCT_SUFFIXES:
        if node_name.endswith(suffix):
            return node_name.removesuffix(suffix)
    return node_name


def _dimension(dimension: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    return dimension.dim_param or None


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _tensors(inner)


def _external_range(directory: Path, tensor: onnx.TensorProto) -> ExternalRange:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    path = directory / location
    if not location or not path.is_file():
        raise BadModelError(f"initializer {tensor.name!r} points to {str(path)!r}, which is not a file")
    size, offset = path.stat().st_size, int(entries.get("offset", 0))
    length = int(entries.get("length", size - offset))
    if offset < 0 or length < 0 or offset + length > size:
        raise BadModelError(
            f"initializer {tensor.name!r} points to bytes {offset} to {offset + length} of {str(path)!r}, "
            f"which has {size}; export the graph again"
        )
    return ExternalRange(tensor.name, path, offset, length)
