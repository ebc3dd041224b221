"""GGUF files: their tensors, those of quantized types dequantized to BF16 as they are read."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import what_it_lacks
from fp4trt.made_tensors import MadeTensor, as_bf16_bits
from fp4trt.safetensors_file import StoredTensor

__all__ = ["is_gguf", "tensors_in_gguf"]

_PLAIN: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_ORIGINAL_SHAPE: Final = "comfy.gguf.orig_shape."
"""What the names of fields begin with that keep the shape of a tensor that was reshaped to be quantized."""


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF does."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def tensors_in_gguf(path: Path) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """Return the tensors of a GGUF file as they are read, and how many are of each quantized type.

    Raises:
        BadCheckpoint: the file is damaged, or a tensor is of a type that the gguf package does not dequantize.
    """
    import gguf

    if not path.is_file():
        raise BadCheckpoint(f"{path} {what_it_lacks(path)}; expected a GGUF file there")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise BadCheckpoint(f"{path} is not a whole GGUF file ({error}); copy it again") from None
    size = path.stat().st_size
    found: dict[str, StoredTensor] = {}
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        name, kind = str(tensor.name), tensor.tensor_type
        shape = _shape(reader, tensor)
        stored = StoredTensor(path, kind.name, shape, int(tensor.data_offset), int(tensor.n_bytes))
        if stored.end > size:
            raise BadCheckpoint(f"{path} ends at byte {size}, but {name} needs {stored.end} bytes; copy it again")
        if kind.name in _PLAIN:
            found[name] = stored
        else:
            found[name] = _dequantized(path, name, stored, kind)
            types[kind.name] = types.get(kind.name, 0) + 1
    return found, types


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """Return a tensor's shape as torch has it: GGUF lists the sizes from the last axis on."""
    field = reader.fields.get(f"{_ORIGINAL_SHAPE}{tensor.name}")
    if field is not None:
        return tuple(int(field.parts[index][0]) for index in field.data)
    return tuple(int(size) for size in reversed(tensor.shape))


def _dequantized(path: Path, name: str, stored: StoredTensor, kind: Any) -> MadeTensor:
    import gguf

    rows, columns = stored.shape[0], int(np.prod(stored.shape[1:], dtype=np.int64))
    whole, nbytes = gguf.GGML_QUANT_SIZES[kind]
    if columns % whole:  # its blocks cross rows
        rows, columns = 1, rows * columns
    row = columns // whole * nbytes
    if rows * row != stored.nbytes:
        raise BadCheckpoint(
            f"{path}: {name} is {kind.name} {list(stored.shape)} in {stored.nbytes} bytes, expected {rows * row}; copy "
            "the file again"
        )
    try:
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), kind)
    except NotImplementedError:
        raise BadCheckpoint(
            f"{path}: {name} is {kind.name}, which the gguf package does not dequantize; take a file in another type"
        ) from None
    if rows == stored.shape[0]:
        return MadeTensor.of(stored, "BF16", stored.shape, functools.partial(_rows, stored, kind, row))
    return MadeTensor.of(
        stored, "BF16", stored.shape, functools.partial(_of_whole, stored, kind, stored.nbytes, stored.shape[0])
    )


def _rows(stored: StoredTensor, kind: Any, row: int, first: int, last: int) -> npt.NDArray[np.uint8]:
    import gguf

    data = stored.bytes(first * row, last * row).reshape(last - first, row)
    with np.errstate(all="ignore"):
        values = gguf.dequantize(data, kind)
    return as_bf16_bits(np.asarray(values, np.float32)).view(np.uint8).reshape(-1)


def _of_whole(stored: StoredTensor, kind: Any, row: int, rows: int, first: int, last: int) -> npt.NDArray[np.uint8]:
    """Return rows of a tensor whose blocks cross rows: all of it is made."""
    whole = _rows(stored, kind, row, 0, 1).reshape(rows, -1)
    return whole[first:last].reshape(-1)
