"""Tensors whose bytes lie in another file: where, whether they fit, and what they hold.

An ONNX initializer may point into any file, a `.safetensors` too, by location (relative to the model), offset
and length. Source: `TensorProto.external_data` in the ONNX specification.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, external_data_helper

from fp4trt.errors import BadGraph
from fp4trt.file_kind import is_file, shortened, what_it_is, what_it_lacks
from fp4trt.linked_files import real_file
from onnx_functions.graph.bodies import circle

__all__ = [
    "BITS",
    "BadSpan",
    "Span",
    "array_of",
    "embedded",
    "in_real_files",
    "load_graph",
    "nbytes_of",
    "read_model",
    "span_of",
    "type_name",
]

_TYPES_BY_BITS: Final = {
    2: "UINT2 INT2",
    4: "FLOAT4E2M1 UINT4 INT4",
    8: "FLOAT8E4M3FN FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0 INT8 UINT8 BOOL",
    16: "FLOAT16 BFLOAT16 INT16 UINT16",
    32: "FLOAT INT32 UINT32",
    64: "DOUBLE INT64 UINT64 COMPLEX64",
    128: "COMPLEX128",
}

BITS: Final[Mapping[int, int]] = {
    TensorProto.DataType.Value(name): bits
    for bits, names in _TYPES_BY_BITS.items()
    for name in names.split()
    if name in TensorProto.DataType.keys()  # noqa: SIM118 - an older onnx knows fewer, and this is not a dict
}
"""Bits of one element; FLOAT4E2M1 lies two a byte, the first in the low nibble."""

_LONGEST_POINTER: Final = 1024
"""Bytes of a file that may be a Git LFS pointer in the place of data."""

_NUMPY: Final[Mapping[int, Any]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT4E2M1: np.uint8,
}


_NAMED: Final = 4
"""Nodes of a circle that a message names."""

_DIGITS: Final = 20
"""Digits of the largest offset that is read."""

Fault = Literal["type", "outside", "link", "length", "file"]


class BadSpan(BadGraph):
    """An initializer's external data is not where it has to be; `fault` says in which way."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True)
class Span:
    """A byte range of a file; `offset` and `length` in bytes."""

    file: Path
    offset: int
    length: int


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, without its external data, whose wires can be followed.

    Raises:
        BadGraph: the file is missing or no ONNX model, or its nodes read each other in a circle.
    """
    model = read_model(path)
    if nodes := circle(model.graph):
        ring = " -> ".join((*reversed(nodes), nodes[-1]) if len(nodes) <= _NAMED else (nodes[-1], "...", nodes[-1]))
        raise BadGraph(
            f"{path}: {len(nodes)} of its nodes read each other in a circle ({ring}), so nothing can compute them; "
            "expected a graph without circles: export it again"
        )
    return model


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without its external data, whatever its nodes read.

    Raises:
        BadGraph: the file is missing or no ONNX model.
    """
    if not path.is_file():
        raise BadGraph(f"{path} {what_it_lacks(path)}; expected an ONNX file: run fp4trt export first")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises types of its own, by version
        kind = what_it_is(path) or f"is not an ONNX model ({str(error).splitlines()[0]}); export it again"
        raise BadGraph(f"{path} {kind}") from None
    if any(isinstance(text, bytes) for text in _texts(model)):  # what protobuf gives for what is not UTF-8
        raise BadGraph(f"{path} holds a name that is no UTF-8: the file is damaged; export it again")
    if not model.graph.node:
        raise BadGraph(f"{path} {what_it_is(path) or 'holds no nodes; expected an exported graph: export it again'}")
    return model


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    for opset in model.opset_import:
        yield opset.domain
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for node in model.graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
    for tensor in model.graph.initializer:
        yield tensor.name
        yield from (text for entry in tensor.external_data for text in (entry.key, entry.value))


def type_name(element_type: int) -> str:
    """Return the name of an ONNX element type, such as FLOAT4E2M1."""
    known = {number: name for name, number in TensorProto.DataType.items()}
    return known.get(element_type, f"type {element_type}")


def nbytes_of(tensor: TensorProto) -> int:
    """Return how many bytes the tensor's elements take.

    Raises:
        BadSpan: their type is unknown.
    """
    if tensor.data_type not in BITS:
        raise BadSpan(
            "type",
            f"initializer {tensor.name} is {type_name(tensor.data_type)}, of unknown size; export the graph again",
        )
    elements: int = math.prod(tensor.dims)
    return -(-elements * BITS[tensor.data_type] // 8)


def span_of(tensor: TensorProto, directory: Path) -> Span | None:
    """Return where the tensor's bytes lie, None for a tensor that lies in the model itself.

    Raises:
        BadSpan: the location leaves the model's directory, the file is missing or too short, or the length
            is not that of the shape. The message names the tensor and no folder of this machine.
    """
    if not external_data_helper.uses_external_data(tensor):
        return None
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    # Posix and Windows spellings of "outside" both count, whatever this machine is.
    relative = PurePosixPath(location.replace("\\", "/"))
    if not location or relative.is_absolute() or ".." in relative.parts or ":" in location:
        raise BadSpan(
            "outside",
            f"initializer {tensor.name} lies at {shortened(location)!r}; expected a path inside the model's directory",
        )
    file = directory / relative
    wanted = nbytes_of(tensor)
    offset = _number(tensor, "offset", entries.get("offset", "0"))
    length = _number(tensor, "length", entries.get("length", str(wanted)))
    if length != wanted:
        raise BadSpan(
            "length",
            f"initializer {tensor.name} has {length} bytes of external data, its shape needs {wanted}; export again",
        )
    needs = f"initializer {tensor.name} needs bytes {offset} to {offset + length} of {shortened(location)}"
    hint = "lay the graph's own weights beside it, or export it again"
    if not is_file(file):
        raise BadSpan("file", f"{needs}, which {what_it_lacks(file)}; {hint}")
    if real_file(directory, relative) is None:
        raise BadSpan(
            "link",
            f"initializer {tensor.name} lies in {location}, a link out of the model's directory that is not one of a "
            "hub's cache (snapshots/ to blobs/), and is not followed; copy the file in its place",
        )
    size = file.stat().st_size
    if offset + length > size:
        told = what_it_is(file) if size < _LONGEST_POINTER else None
        raise BadSpan("length", f"{needs}, which {told or f'ends at byte {size}; {hint}'}")
    return Span(file, offset, length)


def in_real_files(model: onnx.ModelProto, directory: Path) -> tuple[onnx.ModelProto, Path]:
    """Return a model, and the folder of its external data, such that none of their files is a link out of that folder.

    ONNX Runtime refuses a link out of the model's folder. The model itself is returned where there is none, otherwise a
    copy whose locations are those of the files that the links lead to.

    Raises:
        BadSpan: as :func:`span_of`.
    """
    folder = directory.resolve()
    spans = {tensor.name: span_of(tensor, directory) for tensor in model.graph.initializer}
    files = {name: span.file.resolve() for name, span in spans.items() if span is not None}
    if all(file.is_relative_to(folder) for file in files.values()):
        return model, folder
    root = Path(os.path.commonpath([file.parent for file in files.values()]))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        for entry in tensor.external_data if tensor.name in files else ():
            if entry.key == "location":
                entry.value = files[tensor.name].relative_to(root).as_posix()
    return copy, root


def embedded(path: Path) -> onnx.ModelProto:
    """Return an ONNX file with all external data of its initializers in memory, links followed as :func:`span_of` does.

    Raises:
        BadGraph: the file is not an ONNX model, or some data are not where they have to be.
    """
    model = load_graph(path)
    for tensor in model.graph.initializer:
        span = span_of(tensor, path.parent)
        if span is not None:
            del tensor.external_data[:]
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = np.fromfile(span.file, np.uint8, span.length, offset=span.offset).tobytes()
    return model


def _number(tensor: TensorProto, key: str, text: str) -> int:
    if not text.isdecimal() or len(text) > _DIGITS:
        raise BadSpan(
            "length",
            f"initializer {tensor.name} has the {key} {shortened(text)!r} in its external data; export the graph again",
        )
    return int(text)


def array_of(tensor: TensorProto, directory: Path) -> npt.NDArray[Any]:
    """Read an initializer, inside the model or not.

    Returns:
        Its values in its own type; FLOAT4E2M1 as the packed bytes, uint8 [..., K/2].
    """
    span = span_of(tensor, directory)
    if span is None:
        if tensor.data_type == TensorProto.FLOAT4E2M1:
            # raw_data where there is any, else one packed byte an int32_data entry
            packed = tensor.raw_data or bytes(tensor.int32_data)
            return np.frombuffer(packed, np.uint8).reshape(*tensor.dims[:-1], tensor.dims[-1] // 2)
        return onnx.numpy_helper.to_array(tensor)
    if tensor.data_type not in _NUMPY:
        inline = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        inline.raw_data = np.fromfile(span.file, np.uint8, span.length, offset=span.offset).tobytes()
        return onnx.numpy_helper.to_array(inline)  # onnx itself follows no links
    stored = np.fromfile(span.file, np.uint8, span.length, offset=span.offset)
    raw: npt.NDArray[Any] = stored.view(_NUMPY[tensor.data_type])
    if tensor.data_type == TensorProto.FLOAT4E2M1:
        return raw.reshape(*tensor.dims[:-1], tensor.dims[-1] // 2)
    return raw.reshape(tuple(tensor.dims))
