"""Point a graph's initializers at the bytes of a checkpoint, or write them into one file beside the graph."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from calibration.formats.bfloat16 import fp32_pieces_of, largest_magnitude, pieces_of
from fp4trt.account import SCALE_LEAVES
from fp4trt.errors import BadCheckpoint, BadGraph, TooLittleSpace
from fp4trt.safetensors_file import HeldTensor, StoredTensor, naming

__all__ = [
    "Accept",
    "Chunks",
    "bind",
    "data_file",
    "folder_for",
    "must_copy",
    "must_round",
    "refuse_little_space",
    "save_pointing",
    "save_self_contained",
    "save_with_copies",
]

Chunks = Callable[[], Iterable[npt.NDArray[np.uint8]]]
"""Gives a tensor's bytes, in as many pieces as it likes."""

Accept = Callable[[Path], list[str]]
"""Judges a graph that is written and has not its name yet: raises, or returns what it let pass."""

_ELEMENT_TYPES: Final = {
    ir.DataType.FLOAT4E2M1: "U8",
    ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
    ir.DataType.UINT8: "U8",
    ir.DataType.FLOAT: "F32",
    ir.DataType.BFLOAT16: "BF16",
}
"""ONNX element type to how a checkpoint stores it; two FP4 codes make a byte in both."""

_ALIGNMENT: Final = 64


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make the folder of a file that is to be written, and take back what was made of it when anything is raised."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # somebody else put something there
            for folder in made:
                folder.rmdir()
        raise


def bind(model: ir.Model, tensors: Mapping[str, StoredTensor], directory: Path) -> None:
    """Give every weight of the graph the checkpoint's tensor of its name, as external data.

    One that is in no file, because it is made while the checkpoint is read, goes into the graph.

    Args:
        model: changed in place; its weights have no values yet.
        tensors: the checkpoint's.
        directory: where the tensors' files are seen from; locations are relative to it, with ``/``.

    Raises:
        BadGraph: a tensor is missing, or its type or size differ.
    """
    for name, value in _weights(model).items():
        stored = _required(name, value, tensors)
        assert _as_in_graph(stored, value) is None, f"{name} has another type in the graph: it has to be copied"
        if isinstance(stored, HeldTensor):
            value.const_value = ir.Tensor(stored.tensor().numpy(), dtype=value.dtype, name=name)
        else:
            _point(value, stored.file, stored.offset, directory)


def _required(name: str, value: ir.Value, tensors: Mapping[str, StoredTensor]) -> StoredTensor:
    """Return the checkpoint's tensor for an initializer, of its shape, and of its type or one that is rounded."""
    assert value.dtype is not None
    assert value.shape is not None
    stored, shape = tensors.get(name), [int(size) for size in value.shape.numpy()]
    if value.dtype == ir.DataType.FLOAT4E2M1:  # two codes a byte
        shape[-1] //= 2
    kind = _ELEMENT_TYPES.get(value.dtype)
    if stored is None:
        raise BadGraph(f"the graph needs {name} as {kind} {shape}, and the checkpoint has no such tensor")
    if list(stored.shape) != shape or (stored.dtype != kind and _as_in_graph(stored, value) is None):
        raise BadGraph(
            f"the graph needs {name} as {kind} {shape}, the checkpoint has {stored.dtype} {list(stored.shape)}"
        )
    return stored


def _point(value: ir.Value, file: Path, offset: int, directory: Path) -> None:
    """Let an initializer's bytes be those of ``file`` from ``offset`` on, located relative to ``directory``."""
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.ExternalTensor(
        Path(os.path.relpath(file, directory)).as_posix(),
        offset,
        _nbytes(value),
        value.dtype,
        shape=ir.Shape(value.shape.numpy()),
        name=value.name,
        base_dir=directory,
    )


def _weights(model: ir.Model) -> dict[str, ir.Value]:
    """Return the initializers that stand for a checkpoint's tensors, by their state-dict names: they have no values."""
    return {name: value for name, value in model.graph.initializers.items() if value.const_value is None}


def _nbytes(value: ir.Value) -> int:
    assert value.dtype is not None
    assert value.shape is not None
    return int(math.prod(value.shape.numpy()) * value.dtype.bitwidth) // 8


def must_copy(tensors: Mapping[str, StoredTensor], directory: Path) -> str | None:
    """Return why a graph in ``directory`` cannot point at these tensors, or None.

    ONNX resolves external data below the graph's own folder only, and refuses files that are links (as in a hub's
    cache).
    """
    if any(not tensor.is_as_in_file and not isinstance(tensor, HeldTensor) for tensor in tensors.values()):
        return "some weights do not lie in the file as the graph needs them"
    for file in sorted({tensor.file for tensor in tensors.values() if not isinstance(tensor, HeldTensor)}):
        if file.parent.resolve() != directory.resolve():
            return f"the graph is written outside {file.parent}"
        if file.is_symlink() or file.stat().st_nlink > 1:
            return f"{file.name} is a link"
    return None


def must_round(tensors: Mapping[str, StoredTensor], wide: Container[str] = ()) -> str | None:
    """Return why a graph, in which all but codes, scales and some others is BF16, cannot point at tensors, or None.

    Args:
        tensors: of the checkpoint.
        wide: names of the others, which a graph has in FP32.
    """
    others = sorted({tensor.dtype for name, tensor in tensors.items() if _is_moved(name, tensor, wide)})
    return f"weights stored as {', '.join(others)} are rounded to BF16" if others else None


def _is_moved(name: str, tensor: StoredTensor, wide: Container[str]) -> bool:
    """Whether a graph has a tensor in another type than it is stored in."""
    is_fp32 = name.rpartition(".")[2] in SCALE_LEAVES or name in wide
    return tensor.dtype == "F16" or (tensor.dtype == "F32" and not is_fp32)


def refuse_little_space(tensors: Mapping[str, StoredTensor], wide: Container[str], path: Path) -> None:
    """Refuse to copy weights beside a graph onto a disk that they do not fit on, before the graph is made.

    Args:
        tensors: of the checkpoint.
        wide: names of those that the graph has in FP32.
        path: of the graph.

    Raises:
        TooLittleSpace: naming the folder.
    """
    moved = {name: tensor for name, tensor in tensors.items() if _is_moved(name, tensor, wide)}
    sizes = {name: math.prod(tensor.shape) * (4 if name in wide else 2) for name, tensor in moved.items()}
    needed = sum(sizes.get(name, tensor.nbytes) for name, tensor in tensors.items())
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise TooLittleSpace(
            f"{path.parent} has {free:,} bytes free, the weights beside the graph need {needed:,}; make room, or "
            "choose another --output"
        )


def save_pointing(model: ir.Model, tensors: Mapping[str, StoredTensor], path: Path, accept: Accept) -> None:
    """Write a graph whose weights are the checkpoint's own bytes; it gets its name once it is accepted."""
    bind(model, tensors, path.parent)
    # The partial graph stands in the same folder as the final one, so that its relative locations hold.
    partial = path.with_name(f"{path.name}.partial")
    try:
        _write_checked(model, partial, accept)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_with_copies(model: ir.Model, tensors: Mapping[str, StoredTensor], path: Path, accept: Accept) -> None:
    """Write a graph and, in ``NAME.onnx.data``, a copy of its weights, each in the type that the graph has it in.

    Args:
        model: its weights have no values yet.
        tensors: the checkpoint's.
        path: the graph.
        accept: as :func:`save_self_contained`.

    Raises:
        BadGraph: as :func:`bind`.
        BadCheckpoint: a value is not a BF16 number.
    """
    contents: dict[str, Chunks] = {}
    for name, value in _weights(model).items():
        stored = _required(name, value, tensors)
        contents[name] = functools.partial(_as_in_graph(stored, value) or _whole, name, stored)
    save_self_contained(model, contents, path, accept)


def _as_in_graph(
    stored: StoredTensor, value: ir.Value
) -> Callable[[str, StoredTensor], Iterable[npt.NDArray[np.uint8]]] | None:
    """Return what gives a tensor in the type that a graph has it in; None where it is stored so, or in no float."""
    if stored.dtype in ("F16", "F32") and value.dtype == ir.DataType.BFLOAT16:
        return _rounded
    return _widened if stored.dtype == "F16" and value.dtype == ir.DataType.FLOAT else None


def _widened(_name: str, stored: StoredTensor) -> Iterable[npt.NDArray[np.uint8]]:
    return (piece.view(np.uint8) for piece in fp32_pieces_of(stored))


def _rounded(name: str, stored: StoredTensor) -> Iterable[npt.NDArray[np.uint8]]:
    for piece in pieces_of(stored):
        if largest_magnitude(piece) is None:
            raise BadCheckpoint(f"{stored.file}: {name} holds values that are no BF16 numbers; expected finite weights")
        yield piece.view(np.uint8)


def _whole(_name: str, stored: StoredTensor) -> Iterable[npt.NDArray[np.uint8]]:
    return (stored.bytes(),)


def save_self_contained(model: ir.Model, contents: Mapping[str, Chunks], path: Path, accept: Accept) -> list[str]:
    """Write a graph and, in ``NAME.onnx.data``, the named initializers, one piece in memory at a time.

    Args:
        model: its initializers in ``contents`` become external; the others stay in the graph.
        contents: initializer to its bytes, asked for once each, in this order.
        path: the graph; both files appear under their names when they are whole and accepted.
        accept: asked about the graph once onnx has checked it.

    Returns:
        What ``accept`` let pass.
    """
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.partial-", dir=path.parent) as folder:
        partial = Path(folder)
        data = partial / data_file(path).name
        for name, (offset, length) in _write_data(data, contents).items():
            value = model.graph.initializers[name]
            assert length == _nbytes(value), f"{name} needs {_nbytes(value)} bytes, {length} were written"
            _point(value, data, offset, partial)
        passed = _write_checked(model, partial / path.name, accept)
        os.replace(data, data_file(path))
        os.replace(partial / path.name, path)
    return passed


def data_file(path: Path) -> Path:
    """Return where the copied weights of a graph lie: ``NAME.onnx.data`` beside it."""
    return path.with_name(f"{path.name}.data")


def _write_data(data: Path, contents: Mapping[str, Chunks]) -> dict[str, tuple[int, int]]:
    """Write the contents into one file, each at a multiple of its alignment; return offset and length of each."""
    spans = {}
    with naming(data), data.open("wb") as file:
        for name, chunks in contents.items():
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            for chunk in chunks():
                file.write(np.ascontiguousarray(chunk).data)
            spans[name] = (offset, file.tell() - offset)
        file.flush()
        os.fsync(file.fileno())
    return spans


def _write_checked(model: ir.Model, path: Path, accept: Accept) -> list[str]:
    with naming(path), path.open("wb") as file:
        file.write(ir.to_proto(model).SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        raise
    except ValueError as error:  # what lies below the checker has no type of its own
        raise onnx.checker.ValidationError(str(error)) from None
    return accept(path)
