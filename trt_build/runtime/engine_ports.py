"""Inputs and outputs of a loaded engine, with the symbols that its JSON knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fp4trt.errors import BadEngine
from trt_build.runtime.engine_file import EngineFile
from trt_build.signature import Port

__all__ = ["ports_of"]

_TYPES: Final = {
    "FLOAT": "FLOAT",
    "HALF": "FLOAT16",
    "BF16": "BFLOAT16",
    "INT64": "INT64",
    "INT32": "INT32",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}
"""The name of TensorRT's DataType to ONNX's element type."""


def ports_of(engine: Any, trt: Any, file: EngineFile) -> tuple[dict[str, Port], dict[str, Port]]:
    """Return the inputs and the outputs of an ``ICudaEngine`` by name, in order.

    Raises:
        BadEngine: one is of a type, or in a place, that a session does not serve; or the engine's JSON tells of others.
    """
    inputs: dict[str, Port] = {}
    outputs: dict[str, Port] = {}
    for index in range(engine.num_io_tensors):
        name = str(engine.get_tensor_name(index))
        dtype = _TYPES.get(engine.get_tensor_dtype(name).name)
        if dtype is None:
            raise BadEngine(
                f"{file.path}: {name} is {engine.get_tensor_dtype(name).name}, which a session does not serve"
            )
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise BadEngine(f"{file.path}: {name} is read on the host, as a shape, which a session does not serve")
        dims = tuple(int(size) if size >= 0 else None for size in engine.get_tensor_shape(name))
        ports = inputs if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else outputs
        ports[name] = Port(name, dtype, dims)
    signature = file.signature
    if signature is None:
        return inputs, outputs
    return _declared(inputs, signature.inputs, file), _declared(outputs, signature.outputs, file)


def _declared(found: Mapping[str, Port], told: tuple[Port, ...], file: EngineFile) -> dict[str, Port]:
    """Return ports as an engine's JSON tells them, with symbols, once they are those of the engine."""
    ports = {port.name: port for port in told}
    for name in sorted(found.keys() ^ ports.keys()):
        where = "the engine has it, and its JSON does not" if name in found else "its JSON tells of it alone"
        raise BadEngine(f"{file.path}: {name}: {where}; copy both again, or build it again")
    for name, port in ports.items():
        engine = found[name]
        same = port.dtype == engine.dtype and len(port.dims) == len(engine.dims)
        if not same or any(
            a is not None and isinstance(b, int) and a != b for a, b in zip(engine.dims, port.dims, strict=True)
        ):
            raise BadEngine(
                f"{file.path}: {name} is {engine.dtype} {list(engine.dims)}, and its JSON tells of {port.dtype} "
                f"{list(port.dims)}; copy both again, or build it again"
            )
    return ports
