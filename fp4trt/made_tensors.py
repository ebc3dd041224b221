"""Tensors that are read as if they lay in a file as they are wanted: halves swapped, or made of what lies there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fp4trt.safetensors_file import DTYPE_BYTES, StoredTensor

__all__ = ["MadeTensor", "SwappedTensor", "as_bf16_bits"]

_PIECE: Final = 1 << 20


@dataclass(frozen=True)
class SwappedTensor(StoredTensor):
    """A tensor in a file whose halves of rows lie the other way round."""

    def read(self, begin: int, into: npt.NDArray[np.uint8]) -> None:
        """Read the tensor's bytes from ``begin`` on into an array of bytes, until that is full."""
        second = self.nbytes // 2
        while into.nbytes:
            in_file = (begin + second) % self.nbytes
            until = second if begin < second else self.nbytes
            count = min(until - begin, into.nbytes)
            super().read(in_file, into[:count])
            begin, into = begin + count, into[count:]

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the tensor's bytes in order, a piece at a time."""
        for begin in range(0, self.nbytes, _PIECE):
            yield self.bytes(begin, min(begin + _PIECE, self.nbytes))


@dataclass(frozen=True)
class MadeTensor(StoredTensor):
    """A tensor that is made, some rows at a time, when it is read.

    Attributes:
        source: what lies in the file; ``offset`` is where it does.
        rows: (first row, row behind the last) to their values, of as many bytes as such rows of ``dtype`` have.
    """

    source: StoredTensor
    rows: Callable[[int, int], npt.NDArray[np.uint8]]

    @classmethod
    def of(
        cls, source: StoredTensor, dtype: str, shape: tuple[int, ...], rows: Callable[[int, int], npt.NDArray[np.uint8]]
    ) -> MadeTensor:
        """Return a tensor of a dtype and a shape that is made of what lies in a file."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        return cls(source.file, dtype, shape, source.offset, nbytes, source, rows)

    @property
    def end(self) -> int:
        """Where what it is made of ends, in bytes from the start of the file."""
        return self.source.end

    def read(self, begin: int, into: npt.NDArray[np.uint8]) -> None:
        """Make the tensor's bytes from ``begin`` on, until an array of bytes is full."""
        if not into.nbytes:
            return
        row, end = self.nbytes // self._count, begin + into.nbytes
        first, last = begin // row, -(-end // row)
        into[:] = self.rows(first, last)[begin - first * row : end - first * row]

    def pieces(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the tensor's bytes in order, some rows at a time."""
        together = max(1, _PIECE * self._count // max(1, self.nbytes))
        for first in range(0, self._count if self.nbytes else 0, together):
            yield self.rows(first, min(first + together, self._count))

    def forget(self) -> None:
        """Let the system drop what it is made of from its cache."""
        self.source.forget()

    @property
    def _count(self) -> int:
        return self.shape[0] if self.shape else 1


def as_bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return FP32 numbers as the bits of BF16 numbers, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
