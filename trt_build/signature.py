"""Inputs and outputs of a graph, and of the engine that was built from it: names, types and dimensions, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from fp4trt.errors import BadModelError
from onnx_functions.graph.external_data import type_name

__all__ = ["Port", "Signature", "dimension_of", "signature_in", "signature_of"]


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: its name.
        dtype: its ONNX element type, such as BFLOAT16.
        dims: of each axis a number, a symbol, or None where nothing is said.
    """

    name: str
    dtype: str
    dims: tuple[int | str | None, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.dims)}


@dataclass(frozen=True)
class Signature:
    """The inputs and the outputs, each in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {
            "inputs": [port.as_dict() for port in self.inputs],
            "outputs": [port.as_dict() for port in self.outputs],
        }


def signature_of(model: onnx.ModelProto) -> Signature:
    """Return the signature of a graph; initializers that are listed as inputs are none."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = (value for value in model.graph.input if value.name not in stored)
    return Signature(tuple(map(_port, inputs)), tuple(map(_port, model.graph.output)))


def signature_in(manifest: Mapping[str, Any]) -> Signature | None:
    """Return the signature that an engine's JSON tells; None where it tells none, as those of earlier versions.

    Raises:
        BadModelError: it is not as fp4trt writes it.
    """
    if "inputs" not in manifest:
        return None
    try:
        return Signature(_ports(manifest["inputs"]), _ports(manifest["outputs"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadModelError(
            f"the engine's JSON tells its inputs and outputs wrongly ({error}); build it again"
        ) from None


def _ports(listed: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
    ports = tuple(Port(entry["name"], entry["dtype"], tuple(entry["shape"])) for entry in listed)
    for port in ports:
        if not isinstance(port.name, str) or port.dtype not in onnx.TensorProto.DataType.keys():  # noqa: SIM118
            raise TypeError(f"{port.name!r} of type {port.dtype!r}")
        if not all(dim is None or isinstance(dim, int | str) for dim in port.dims):
            raise TypeError(f"{port.name} of shape {list(port.dims)}")
    return ports


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    return Port(value.name, type_name(tensor.elem_type), tuple(map(dimension_of, tensor.shape.dim)))


def dimension_of(dimension: onnx.TensorShapeProto.Dimension) -> int | str | None:
    """Return a size, the name of a symbolic one, or None where nothing is known of it."""
    if dimension.HasField("dim_value"):
        return int(dimension.dim_value)
    return dimension.dim_param or None
