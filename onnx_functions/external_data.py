"""Tensors whose bytes lie in another file: where, whether they fit, and what they hold.

An ONNX initializer may point into any file, a `.safetensors` too, by location (relative to the model), offset
and length. Source: `TensorProto.external_data` in the ONNX specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, external_data_helper

from onnx_functions.errors import BadGraph
from onnx_functions.file_input import is_file, shortened, what_it_lacks
from onnx_functions.wires import circle

__all__ = ["BITS", "BadSpan", "Span", "array_of", "load_graph", "nbytes_of", "read_model", "span_of", "type_name"]

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
    if name in TensorProto.DataType.keys()  # noqa: SIM118 - an older onnx knows fewer, and this is no dict
}
"""Bits of one element; FLOAT4E2M1 lies two a byte, the first in the low nibble."""

_NUMPY: Final[Mapping[int, Any]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT4E2M1: np.uint8,
}


_NAMED: Final = 4
"""Nodes of a circle that a message names."""

_DIGITS: Final = 20
"""Of the largest number that an offset may be."""

Fault = Literal["type", "outside", "length", "file"]


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
        raise BadGraph(f"{path} is not an ONNX model ({str(error).splitlines()[0]}); export it again") from None
    if any(isinstance(text, bytes) for text in _texts(model)):  # what protobuf gives for what is no UTF-8
        raise BadGraph(f"{path} holds a name that is no UTF-8: the file is damaged; export it again")
    if not model.graph.node:
        raise BadGraph(f"{path} holds no nodes; expected an exported graph: export it again")
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
    size = file.stat().st_size
    if offset + length > size:
        raise BadSpan("length", f"{needs}, which ends at byte {size}; {hint}")
    return Span(file, offset, length)


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
        return onnx.numpy_helper.to_array(tensor, base_dir=str(directory))
    stored = np.fromfile(span.file, np.uint8, span.length, offset=span.offset)
    raw: npt.NDArray[Any] = stored.view(_NUMPY[tensor.data_type])
    if tensor.data_type == TensorProto.FLOAT4E2M1:
        return raw.reshape(*tensor.dims[:-1], tensor.dims[-1] // 2)
    return raw.reshape(tuple(tensor.dims))
