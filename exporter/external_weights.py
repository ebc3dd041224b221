"""Point a graph's initializers at the bytes of a checkpoint, or copy them into one file beside the graph."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx
import onnx_ir as ir

from calibration.safetensors_file import StoredTensor, naming
from exporter.errors import BadGraph

__all__ = ["bind", "data_file", "must_copy", "save_pointing", "save_with_copies"]

_ELEMENT_TYPES: Final = {
    ir.DataType.FLOAT4E2M1: "U8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.FLOAT: "F32",
    ir.DataType.BFLOAT16: "BF16",
}
"""ONNX element type to how a checkpoint stores it; two FP4 codes make a byte in both."""

_ALIGNMENT: Final = 64


def bind(model: ir.Model, tensors: Mapping[str, StoredTensor], directory: Path) -> None:
    """Give every weight of the graph the checkpoint's tensor of its name, as external data.

    Args:
        model: changed in place; its weights have no values yet.
        tensors: the checkpoint's.
        directory: where the tensors' files are seen from; locations are relative to it, with ``/``.

    Raises:
        BadGraph: a tensor is missing, or its type or size differ.
    """
    for name, value in _weights(model).items():
        stored = tensors.get(name)
        assert value.dtype is not None
        assert value.shape is not None
        wanted = (_ELEMENT_TYPES.get(value.dtype), _nbytes(value))
        found = (stored.dtype, stored.nbytes) if stored else ("nothing", 0)
        if stored is None or wanted != found:
            raise BadGraph(f"the graph needs {name} as {wanted[0]} of {wanted[1]} bytes, the checkpoint has {found}")
        value.const_value = ir.ExternalTensor(
            Path(os.path.relpath(stored.file, directory)).as_posix(),
            stored.offset,
            stored.nbytes,
            value.dtype,
            shape=ir.Shape(value.shape.numpy()),
            name=name,
            base_dir=directory,
        )


def _weights(model: ir.Model) -> dict[str, ir.Value]:
    """Return the initializers that stand for a checkpoint's tensors: their names are state-dict names, with a dot."""
    return {name: value for name, value in model.graph.initializers.items() if "." in name}


def _nbytes(value: ir.Value) -> int:
    assert value.dtype is not None
    assert value.shape is not None
    return int(math.prod(value.shape.numpy()) * value.dtype.bitwidth) // 8


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


def save_pointing(model: ir.Model, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Write a graph whose weights are the checkpoint's own bytes, checked by onnx, under its name when it is whole."""
    bind(model, tensors, path.parent)
    # The partial graph stands in the same folder as the final one, so that its relative locations hold.
    partial = path.with_name(f"{path.name}.partial")
    try:
        _write_checked(model, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_with_copies(model: ir.Model, tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Write a graph and, in ``NAME.onnx.data``, a copy of its weights, one tensor in memory at a time."""
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.partial-", dir=path.parent) as folder:
        partial = Path(folder)
        data = partial / data_file(path).name
        bind(model, _copy(tensors, list(_weights(model)), data), partial)
        _write_checked(model, partial / path.name)
        os.replace(data, data_file(path))
        os.replace(partial / path.name, path)


def data_file(path: Path) -> Path:
    """Return where the copied weights of a graph lie: ``NAME.onnx.data`` beside it."""
    return path.with_name(f"{path.name}.data")


def _copy(tensors: Mapping[str, StoredTensor], names: Sequence[str], data: Path) -> dict[str, StoredTensor]:
    """Write the named tensors into one file, each at a multiple of its alignment; return where they are."""
    copies = {}
    with naming(data), data.open("wb") as file:
        for name in names:
            if name not in tensors:
                raise BadGraph(f"the graph needs {name}, which the checkpoint does not have; export and quantize again")
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            copies[name] = replace(tensors[name], file=data, offset=file.tell())
            file.write(tensors[name].bytes().data)
        file.flush()
        os.fsync(file.fileno())
    return copies


def _write_checked(model: ir.Model, path: Path) -> None:
    with naming(path), path.open("wb") as file:
        file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())
    onnx.checker.check_model(path, full_check=True)
