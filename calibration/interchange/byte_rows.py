"""Tensors as rows of bytes that are made while they are read: moved, joined and rearranged, never computed with.

A matrix [N, ...] has N rows, a vector N rows of one element, a scalar one row. All that tells one layout from another
is which bytes stand where: rows of several tensors, nibbles, the tiles of block scales, padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fp4trt.cublas_tiles import swizzled, unswizzled
from fp4trt.safetensors_file import StoredTensor, TensorPlan

__all__ = [
    "ByteRows",
    "Bytes",
    "cropped",
    "halves_swapped",
    "held",
    "joined",
    "nibbles_swapped",
    "padded",
    "part",
    "repeated",
    "reshaped",
    "stored",
    "tiled",
    "untiled",
]

Bytes = npt.NDArray[np.uint8]

_PIECE: Final = 1 << 20
"""Bytes that are read at a time: they stay in the processor's cache for what is done with them."""

_BAND: Final = 128
"""Rows of a tile of block scales; pieces are whole bands, so that no tile is made twice."""


@dataclass(frozen=True)
class ByteRows:
    """A tensor whose bytes are made when they are asked for.

    Attributes:
        dtype: as safetensors names it.
        shape: of its elements.
        width: bytes of a row.
        rows: (first, count) to the bytes of some rows, [count, width].
    """

    dtype: str
    shape: tuple[int, ...]
    width: int
    rows: Callable[[int, int], Bytes]

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * self.width

    def pieces(self) -> Iterator[Bytes]:
        """Yield all bytes in order, about a MiB at a time."""
        step = max(_PIECE // max(self.width, 1) // _BAND, 1) * _BAND
        for first in range(0, self.count if self.width else 0, step):
            yield self.rows(first, min(step, self.count - first))

    def all(self) -> Bytes:
        """Return all bytes of a small tensor, flat."""
        return self.rows(0, self.count).reshape(-1)

    def plan(self, name: str) -> TensorPlan:
        """Return the plan to write it under a name."""
        return TensorPlan(name, self.dtype, self.shape)


def stored(tensor: StoredTensor) -> ByteRows:
    """Return a tensor of a file."""
    count = tensor.shape[0] if tensor.shape else 1
    width = tensor.nbytes // count if count else 0

    def rows(first: int, number: int) -> Bytes:
        return tensor.bytes(first * width, (first + number) * width).reshape(number, width)

    return ByteRows(tensor.dtype, tensor.shape, width, rows)


def held(dtype: str, shape: tuple[int, ...], data: Bytes) -> ByteRows:
    """Return bytes in memory as a tensor."""
    matrix = np.ascontiguousarray(data).reshape(shape[0] if shape else 1, -1)
    return ByteRows(dtype, shape, matrix.shape[1], lambda first, count: matrix[first : first + count])


def repeated(row: ByteRows, count: int) -> ByteRows:
    """Return a vector [count] of one scalar."""
    data = row.all()
    return ByteRows(row.dtype, (count,), data.size, lambda _, number: np.tile(data, (number, 1)))


def part(whole: ByteRows, row: int, count: int) -> ByteRows:
    """Return some rows of a tensor, from one on."""
    shape = (count, *whole.shape[1:])
    return replace(whole, shape=shape, rows=lambda first, number: whole.rows(row + first, number))


def joined(parts: Sequence[ByteRows]) -> ByteRows:
    """Return tensors of one dtype and width of rows, one below the other."""
    if len(parts) == 1:
        return parts[0]
    begins = np.cumsum([0, *(each.count for each in parts)])

    def rows(first: int, count: int) -> Bytes:
        spans = (
            (each, max(first - begin, 0), min(first + count - begin, each.count))
            for each, begin in zip(parts, begins.tolist(), strict=False)
        )
        return np.concatenate([each.rows(low, high - low) for each, low, high in spans if low < high])

    return replace(parts[0], shape=(int(begins[-1]), *parts[0].shape[1:]), rows=rows)


def halves_swapped(whole: ByteRows) -> ByteRows:
    """Return a tensor with its two halves of rows the other way round."""
    half = whole.count // 2
    return joined([part(whole, half, whole.count - half), part(whole, 0, half)])


def nibbles_swapped(codes: ByteRows) -> ByteRows:
    """Return codes with the two nibbles of each byte exchanged: low first becomes high first, and back."""

    def rows(first: int, count: int) -> Bytes:
        data = codes.rows(first, count)
        return np.asarray(data << 4 | data >> 4, np.uint8)

    return replace(codes, rows=rows)


def cropped(whole: ByteRows, count: int, width: int) -> ByteRows:
    """Return the first rows and columns of a matrix of bytes."""
    if whole.shape == (count, width):
        return whole
    return replace(
        whole, shape=(count, width), width=width, rows=lambda first, number: whole.rows(first, number)[:, :width]
    )


def padded(whole: ByteRows, count: int, width: int) -> ByteRows:
    """Return a matrix of bytes with rows and columns of zeros behind its own."""
    if whole.shape == (count, width):
        return whole

    def rows(first: int, number: int) -> Bytes:
        there = max(min(whole.count - first, number), 0)
        data = np.zeros((number, width), np.uint8)
        if there:
            data[:there, : whole.width] = whole.rows(first, there)
        return data

    return replace(whole, shape=(count, width), width=width, rows=rows)


def tiled(scales: ByteRows) -> ByteRows:
    """Return block scales [N, C] in the tiles of cuBLAS, [128 * ceil(N / 128), 4 * ceil(C / 4)], padded with zeros."""
    whole = padded(scales, -(-scales.count // _BAND) * _BAND, -(-scales.width // 4) * 4)
    return replace(whole, rows=lambda first, count: _of_bands(first, count, lambda a, n: swizzled(whole.rows(a, n))))


def untiled(tiles: ByteRows, count: int, width: int) -> ByteRows:
    """Return block scales [count, width] in row-major order out of tiles, which may be stored in any shape.

    Args:
        tiles: 128 * ceil(count / 128) * 4 * ceil(width / 4) bytes.
        count, width: without padding.
    """
    high, wide = -(-count // _BAND) * _BAND, -(-width // 4) * 4
    assert math.prod(tiles.shape) == high * wide, f"{tiles.shape} is not the shape of tiles of {count} x {width}"
    whole = reshaped(tiles, (high, wide))

    def rows(first: int, number: int) -> Bytes:
        return _of_bands(first, number, lambda a, n: unswizzled(whole.rows(a, n).reshape(-1), n, wide))

    return cropped(replace(whole, rows=rows), count, width)


def _of_bands(first: int, count: int, made: Callable[[int, int], Bytes]) -> Bytes:
    """Return some rows of what is made of whole bands of rows."""
    begin = first // _BAND * _BAND
    end = -(-(first + count) // _BAND) * _BAND
    return made(begin, end - begin)[first - begin : first - begin + count]


def reshaped(whole: ByteRows, shape: tuple[int, ...]) -> ByteRows:
    """Return the same bytes in the same order as a tensor of another shape."""
    if whole.shape == shape:
        return whole
    count = shape[0] if shape else 1
    width = whole.nbytes // max(count, 1)

    def rows(first: int, number: int) -> Bytes:
        begin, end = first * width, (first + number) * width
        low, high = begin // whole.width, -(-end // whole.width)
        data = whole.rows(low, high - low).reshape(-1)
        return data[begin - low * whole.width : end - low * whole.width].reshape(number, width)

    return ByteRows(whole.dtype, shape, width, rows)
