"""Safetensors files with the byte order under our control.

The safetensors library sorts tensors as it likes and hides their offsets; an ONNX graph that points into the file needs
both. The format is one page: eight bytes of little-endian header length N, N bytes of JSON (name to dtype, shape and
data_offsets), then the data without gaps. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import what_it_is, what_it_lacks
from fp4trt.json_file import strings_by_name

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BYTES",
    "READABLE",
    "HeldTensor",
    "StoredTensor",
    "TensorPlan",
    "bytes_of",
    "hold",
    "is_reserved",
    "metadata_in_file",
    "naming",
    "plan_of",
    "reserve",
    "sha256_of",
    "tensors_in_file",
    "write",
]

_BITS: Final = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an element in a file. One of a dtype that is not here is taken to be as long as the header says."""

DTYPE_BYTES: Final = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "U8": 1,
    "I8": 1,
    "I32": 4,
    "I64": 8,
    "BOOL": 1,
}
READABLE: Final = tuple(DTYPE_BYTES)
"""The dtypes that can be read; files may hold tensors of others."""

_ALIGNMENT: Final = 64
_MAX_HEADER: Final = 100_000_000
_PIECE: Final = 1 << 20
"""Bytes that are read at a time: they stay in the processor's cache for what is done with them."""

_AHEAD: Final = 32 * _PIECE


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is to be written: ``dtype`` by its safetensors name, such as ``F8_E4M3``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@functools.cache
def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I32": torch.int32,
        "I64": torch.int64,
        "BOOL": torch.bool,
    }


@functools.cache
def _names_of_torch_dtypes() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in _torch_dtypes().items()}


def plan_of(name: str, tensor: torch.Tensor) -> TensorPlan:
    """Return the plan to store a tensor as it is."""
    return TensorPlan(name, _names_of_torch_dtypes()[tensor.dtype], tuple(tensor.shape))


def bytes_of(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return a tensor's bytes, in row-major order."""
    import torch

    flat = tensor.detach().cpu().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # one value that was expanded is contiguous at a stride of 0
    data: npt.NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return data


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: ``offset`` counts from the start of the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        """Where it ends, in bytes from the start of the file."""
        return self.offset + self.nbytes

    @property
    def is_as_in_file(self) -> bool:
        """Whether its bytes are those of the file from ``offset`` on, so that others can be pointed at them."""
        return type(self) is StoredTensor

    def bytes(self, begin: int = 0, end: int | None = None) -> npt.NDArray[np.uint8]:
        """Read the tensor's bytes from ``begin`` to ``end``; nothing stays mapped."""
        data = np.empty((self.nbytes if end is None else end) - begin, np.uint8)
        self.read(begin, data)
        return data

    def read(self, begin: int, into: npt.NDArray[np.uint8]) -> None:
        """Read the tensor's bytes from ``begin`` on into an array of bytes, until that is full.

        Raises:
            BadCheckpoint: the file has become shorter.
        """
        with self.file.open("rb", buffering=0) as file:
            _advise(file, self.offset + begin, into.nbytes, "POSIX_FADV_WILLNEED")
            file.seek(self.offset + begin)
            self._fill(file, into)

    def tensor(self) -> torch.Tensor:
        """Read the tensor as torch has it; nothing stays mapped.

        Raises:
            BadCheckpoint: it is of a dtype that is not read here.
        """
        import torch

        if self.dtype not in READABLE:
            raise BadCheckpoint(
                f"{self.file} holds a tensor {list(self.shape)} as {self.dtype}, which fp4trt does not read; expected "
                f"one of: {', '.join(READABLE)}"
            )
        if not self.nbytes:  # of no elements; torch views only what has a stride
            return torch.empty(self.shape, dtype=_torch_dtypes()[self.dtype])
        if self.dtype == "BOOL":  # torch has 0 and 1 alone
            return torch.from_numpy(self.bytes() != 0).reshape(self.shape)
        return torch.from_numpy(self.bytes()).view(_torch_dtypes()[self.dtype]).reshape(self.shape)

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the tensor's bytes in order, a piece at a time, which holds until the next is asked for."""
        piece = np.empty(min(_PIECE, self.nbytes), np.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for begin in range(0, self.nbytes, _PIECE):
                _advise(file, self.offset + begin + _AHEAD, _PIECE, "POSIX_FADV_WILLNEED")
                into = piece[: min(_PIECE, self.nbytes - begin)]
                self._fill(file, into)
                yield into

    def forget(self) -> None:
        """Let the system drop the tensor from its cache, which a file larger than memory clears of all else."""
        with self.file.open("rb", buffering=0) as file:
            _advise(file, self.offset, self.nbytes, "POSIX_FADV_DONTNEED")

    def _fill(self, file: io.FileIO, into: npt.NDArray[np.uint8]) -> None:
        missing = into.data
        while missing:
            count = file.readinto(missing)
            if not count:
                raise BadCheckpoint(f"{self.file} has become shorter while it was read; copy it again")
            missing = missing[count:]


def _advise(file: io.FileIO, offset: int, count: int, advice: str) -> None:
    """Tell the system how some of a file is going to be read: by itself it reads little ahead, and keeps everything."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is not None:  # a hint that Windows has no word for, and does without
        advise(file.fileno(), offset, count, getattr(os, advice))


@dataclass(frozen=True)
class HeldTensor(StoredTensor):
    """A tensor in memory, read as if it lay in a file."""

    data: npt.NDArray[np.uint8]

    def read(self, begin: int, into: npt.NDArray[np.uint8]) -> None:
        """Copy the tensor's bytes from ``begin`` on into an array of bytes."""
        into[:] = self.data[begin : begin + into.nbytes]

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield all of the tensor's bytes."""
        yield self.data

    def forget(self) -> None:
        """Do nothing: it is in no file."""


def hold(name: str, tensor: torch.Tensor) -> HeldTensor:
    """Return a floating-point tensor as something that can be read."""
    plan = plan_of(name, tensor)
    return HeldTensor(Path(), plan.dtype, plan.shape, 0, plan.nbytes, bytes_of(tensor))


def tensors_in_file(path: Path) -> dict[str, StoredTensor]:
    """Return where every tensor of a safetensors file lies, having checked that the file can hold them.

    Raises:
        BadCheckpoint: the file is missing, cut short, or not safetensors.
    """
    if not path.is_file():
        raise BadCheckpoint(f"{path} {what_it_lacks(path)}; expected a safetensors file there")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _MAX_HEADER
        if length >= _MAX_HEADER or 8 + length > size:
            speaks = f", header of {length}" if len(first) == 8 else ""
            kind = what_it_is(path) or f"is not a safetensors file ({size} bytes{speaks}); copy it again"
            raise BadCheckpoint(f"{path} {kind}")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            stored = {name: _stored(path, 8 + length, entry) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadCheckpoint(f"{path} has a damaged safetensors header ({error}); copy it again") from None
    for name, tensor in stored.items():
        if tensor.offset + tensor.nbytes > size:
            raise BadCheckpoint(
                f"{path} ends at byte {size}, but {name} needs {tensor.offset + tensor.nbytes} bytes; copy it again"
            )
    return stored


def metadata_in_file(path: Path) -> dict[str, str]:
    """Return the ``__metadata__`` of a file that :func:`tensors_in_file` reads, empty without one.

    Raises:
        BadCheckpoint: it is not an object of strings.
    """
    with path.open("rb") as file:
        metadata = json.loads(file.read(struct.unpack("<Q", file.read(8))[0])).get("__metadata__") or {}
    try:
        return strings_by_name(metadata, "__metadata__")
    except TypeError as error:
        raise BadCheckpoint(f"{path} has a damaged safetensors header ({error}); copy it again") from None


def _stored(path: Path, data_start: int, entry: Mapping[str, Any]) -> StoredTensor:
    begin, end = (int(n) for n in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    bits = _BITS.get(dtype)
    if not 0 <= begin <= end or min(shape, default=0) < 0 or (bits and math.prod(shape) * bits != 8 * (end - begin)):
        raise ValueError(f"{dtype}{list(shape)} does not fill bytes {begin} to {end}")
    return StoredTensor(path, dtype, shape, data_start + begin, end - begin)


def write(
    path: Path,
    plan: Sequence[TensorPlan],
    pieces: Iterable[tuple[str, npt.NDArray[np.uint8]]],
    metadata: Mapping[str, str],
) -> str:
    """Write a safetensors file in exactly the planned order, synced to disk, one piece in memory at a time.

    Args:
        path: the file; the caller writes into a folder that is not final yet.
        plan: the tensors in file order; those with larger elements first keep every offset aligned.
        pieces: (name, some of its bytes) in the same order; a tensor may come in several pieces, one after the other.
        metadata: for the header's ``__metadata__``.

    Returns:
        The file's SHA-256, hexadecimal.
    """
    header = _header(plan, metadata)
    digest = hashlib.sha256(header)
    with naming(path), path.open("wb") as file:
        file.write(header)
        given = iter(pieces)
        for tensor in plan:
            missing = tensor.nbytes
            while missing:
                name, data = next(given, ("nothing", np.empty(1, np.uint8)))
                if name != tensor.name or not 0 < data.nbytes <= missing:
                    raise AssertionError(f"planned {tensor}, {missing} bytes missing, got {name} of {data.nbytes}")
                view = np.ascontiguousarray(data).reshape(-1).data
                digest.update(view)
                file.write(view)
                missing -= data.nbytes
        if (more := next(given, None)) is not None:
            raise AssertionError(f"got {more[0]}, which is not planned")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def reserve(path: Path, plan: Sequence[TensorPlan], metadata: Mapping[str, str]) -> dict[str, int]:
    """Write a safetensors file's header and give it its full length, to be filled in any order.

    Args:
        path, plan, metadata: as :func:`write` takes them. Data that a file of the same plan has already stay.

    Returns:
        Where each tensor's data begin, in bytes from the start of the file.
    """
    header = _header(plan, metadata)
    with naming(path), path.open("r+b" if path.exists() else "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(tensor.nbytes for tensor in plan))
    return {tensor.name: len(header) + begin for tensor, (begin, _) in zip(plan, _spans(plan), strict=True)}


def is_reserved(path: Path, plan: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bool:
    """Whether a file has the header and the length that :func:`reserve` gives it."""
    header = _header(plan, metadata)
    if not path.is_file() or path.stat().st_size != len(header) + sum(tensor.nbytes for tensor in plan):
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Attach a path to an OSError that has no filename, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _header(plan: Sequence[TensorPlan], metadata: Mapping[str, str]) -> bytes:
    """Return length and JSON, padded with spaces so that the data start on a multiple of 64."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    for tensor, (begin, end) in zip(plan, _spans(plan), strict=True):
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _spans(plan: Sequence[TensorPlan]) -> Iterator[tuple[int, int]]:
    offset = 0
    for tensor in plan:
        yield offset, offset + tensor.nbytes
        offset += tensor.nbytes


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, hexadecimal."""
    with path.open("rb", buffering=0) as file:
        digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
        while count := file.readinto(piece):
            digest.update(piece[:count])
        return digest.hexdigest()
