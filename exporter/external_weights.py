"""Point a graph's initializers at the bytes of a checkpoint, or copy them into one file beside the graph."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from calibration.safetensors_file import StoredTensor
from exporter.errors import BadGraph

__all__ = ["bind", "must_copy", "save"]

_ELEMENT_TYPES: Final = {
    ir.DataType.FLOAT4E2M1: "U8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT: "F32",
    ir.DataType.BFLOAT16: "BF16",
}
"""ONNX element type to how a checkpoint stores it; two FP4 codes make a byte in both."""


def bind(model: ir.Model, tensors: Mapping[str, StoredTensor], directory: Path) -> None:
    """Give every initializer without a value the checkpoint's tensor of its name, as external data.

    Args:
        model: changed in place.
        tensors: the checkpoint's.
        directory: where the graph will stand; locations are relative to it, with ``/``.

    Raises:
        BadGraph: a tensor is missing, or its type or size differ.
    """
    for name, value in model.graph.initializers.items():
        if value.const_value is not None and not _is_traced(value):
            continue
        stored = tensors.get(name)
        assert value.dtype is not None
        assert value.shape is not None
        wanted = (_ELEMENT_TYPES.get(value.dtype), _nbytes(value))
        found = (stored.dtype, stored.nbytes) if stored else ("nothing", 0)
        if stored is None or wanted != found:
            raise BadGraph(f"the graph needs {name} as {wanted[0]} of {wanted[1]} bytes, the checkpoint has {found}")
        location = Path(os.path.relpath(stored.file, directory)).as_posix()
        value.const_value = ir.ExternalTensor(
            location,
            stored.offset,
            stored.nbytes,
            value.dtype,
            shape=ir.Shape(value.shape.numpy()),
            name=name,
            base_dir=directory,
        )


def _is_traced(value: ir.Value) -> bool:
    """Whether the value is a weight that was traced without data."""
    raw = getattr(value.const_value, "raw", None)
    return getattr(getattr(raw, "device", None), "type", None) == "meta"


def _nbytes(value: ir.Value) -> int:
    assert value.dtype is not None
    assert value.shape is not None
    elements = 1
    for size in value.shape.numpy():
        elements *= size
    return int(elements * value.dtype.bitwidth) // 8


def must_copy(tensors: Mapping[str, StoredTensor], directory: Path) -> str | None:
    """Return why a graph in ``directory`` cannot point at these tensors, or None.

    ONNX resolves external data below the graph's own folder only, and refuses files that are links (as in a hub's
    cache).
    """
    for file in sorted({tensor.file for tensor in tensors.values()}):
        if file.parent.resolve() != directory.resolve():
            return f"the graph is written outside {file.parent}"
        if file.is_symlink() or file.stat().st_nlink > 1:
            return f"{file.name} is a link"
    return None


def save(model: ir.Model, path: Path, copy_weights: bool) -> None:
    """Write the graph, checked by onnx, under its final name only when it is whole.

    Args:
        model: with all initializers bound.
        path: the ``.onnx`` file.
        copy_weights: also copy every tensor into ``NAME.onnx.data``; else the graph points at where they are.
    """
    # A partial graph stands in the same folder as the final one, so that its relative locations hold.
    partial = path.with_name(f"{path.name}.partial")
    data = path.with_name(f"{path.name}.data")
    partial_data = partial.with_name(f"{data.name}.partial")
    try:
        if copy_weights:
            ir.save(model, partial, external_data=partial_data.name, size_threshold_bytes=1024)
            proto = onnx.load(partial, load_external_data=False)
            onnx.checker.check_model(partial, full_check=True)
            for tensor in proto.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = data.name
            _write_synced(partial, proto.SerializeToString(deterministic=True))
            os.replace(partial_data, data)
        else:
            _write_synced(partial, ir.to_proto(model).SerializeToString(deterministic=True))
            onnx.checker.check_model(partial, full_check=True)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        partial_data.unlink(missing_ok=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
