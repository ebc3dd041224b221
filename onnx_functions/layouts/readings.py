"""The readings of a quantized linear's bytes: what a tile of its weight is under each.

A tile is some rows and columns of the weight; only the bytes that it needs are read. A reading gives it without the
global scale, which is one number: :mod:`onnx_functions.layouts.detection` tries that in both its meanings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fp4trt.cublas_tiles import unswizzled
from fp4trt.layouts import swizzled_shape, swizzled_shapes
from fp4trt.safetensors_file import StoredTensor

__all__ = [
    "FP8_CODES",
    "HIGH_FIRST",
    "LOW_FIRST",
    "NONE",
    "ROW_MAJOR",
    "TILES",
    "Floats",
    "Reading",
    "StoredLinear",
    "Tile",
    "floats_of",
    "readings_of",
]

ROW_MAJOR, TILES, TRANSPOSED, NONE = "row-major", "cuBLAS 128x4 tiles", "transposed", "none"
LOW_FIRST, HIGH_FIRST = "low first", "high first"

Floats = npt.NDArray[np.float32]
_Bytes = npt.NDArray[np.uint8]

_E2M1: Final = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_LOW: Final = np.tile(np.concatenate((_E2M1, -_E2M1)), 16)
_HIGH: Final = np.repeat(np.concatenate((_E2M1, -_E2M1)), 16)
"""The values of the low and of the high nibble of each byte."""
FP8_CODES: Final = ("F8_E4M3", "F8_E5M2")
_NV_BLOCK: Final = 16
_MX_BLOCK: Final = 32
_POWERS: Final = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)
"""Values of E8M0 by byte: 2^(b - 127), and NaN."""
_FP8: Final[dict[str, Any]] = {"E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}
_SIXTEEN: Final[dict[str, Any]] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


@dataclass(frozen=True)
class Reading:
    """What bytes may mean.

    Attributes:
        number: `E2M1`, or of FP8 `E4M3` or `E5M2`.
        orientation: `rows` of K weights; `transposed`: rows of N weights; `columns`: the bytes of `rows` transposed.
        block_scales: their order: `row-major`, `cuBLAS 128x4 tiles`, `transposed`, `none`.
        nibbles: which holds the first of two codes: `low first`, `high first`, `none`.
    """

    number: str
    orientation: str
    block_scales: str
    nibbles: str


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear: its codes, and its block scales (E4M3 in NVFP4, E8M0 in MXFP8, None in FP8)."""

    path: str
    codes: StoredTensor
    scales: StoredTensor | None

    @property
    def block(self) -> int:
        """How many weights of a row share a block scale; of FP8 too, whose tiles may be cut anywhere."""
        return _MX_BLOCK if self.codes.dtype in FP8_CODES and self.scales is not None else _NV_BLOCK


@dataclass(frozen=True)
class Tile:
    """Rows `row` to `row + rows` and columns likewise of a weight."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def turned(self) -> Tile:
        """The same tile of the transposed weight."""
        return Tile(self.column, self.columns, self.row, self.rows)


def _rows(stored: StoredTensor, first: int, count: int, begin: int = 0, end: int | None = None) -> _Bytes:
    """Read the bytes `begin` to `end` of some rows of a matrix, [count, end - begin]."""
    width = stored.nbytes // max(stored.shape[0], 1)
    read = stored.bytes(first * width, (first + count) * width).reshape(count, width)
    return np.ascontiguousarray(read[:, begin:end])


def floats_of(stored: StoredTensor, row: int, rows: int, column: int, columns: int) -> Floats:
    """Return a tile of a 16- or 32-bit matrix."""
    kind = np.dtype(_SIXTEEN[stored.dtype])
    raw = _rows(stored, row, rows, column * kind.itemsize, (column + columns) * kind.itemsize)
    return np.asarray(raw.view(kind).astype(np.float32))


def readings_of(linear: StoredLinear, shape: tuple[int, int], tile: Tile) -> Iterator[tuple[Reading, Floats]]:
    """Yield a tile of a weight under each reading that its shapes allow, without global scale.

    Args:
        linear: the stored linear.
        shape: [N, K] of the weight by its 16-bit source; what is stored may be padded.
        tile: within that, its columns in blocks of the linear's.
    """
    rows, columns = shape
    if linear.codes.dtype in FP8_CODES:
        yield from (_fp8_readings if linear.scales is None else _mxfp8_readings)(linear, shape, tile)
        return
    assert linear.scales is not None, "codes of NVFP4 without block scales are never read"
    stored = linear.codes.shape
    for orientation, fits in (
        ("rows", _holds(stored, rows, columns // 2)),
        ("transposed", rows % 16 == 0 and _holds(stored, columns, rows // 2)),
    ):
        if fits:
            where = tile if orientation == "rows" else tile.turned
            packed = _rows(linear.codes, where.row, where.rows, where.column // 2, (where.column + where.columns) // 2)
            for order, raw in _block_scales(linear, where, linear.codes.shape[1] // 8):
                scales = _e4m3(raw)
                for nibbles in (LOW_FIRST, HIGH_FIRST):
                    value = _weights(packed, scales, nibbles)
                    yield Reading("E2M1", orientation, order, nibbles), value if where is tile else value.T
    if _holds(stored, columns // 2, rows) and _holds(linear.scales.shape, columns // 16, rows):
        packed = _turned(linear.codes, tile.column // 2, tile.columns // 2, tile)
        scales = _e4m3(_turned(linear.scales, tile.column // 16, tile.columns // 16, tile))
        for nibbles in (LOW_FIRST, HIGH_FIRST):
            yield Reading("E2M1", "columns", ROW_MAJOR, nibbles), _weights(packed, scales, nibbles)


def _holds(stored: tuple[int, ...], rows: int, columns: int) -> bool:
    """Whether a stored matrix may be one of this shape, padded."""
    return len(stored) == 2 and 0 <= stored[0] - rows < 128 and 0 <= stored[1] - columns < 128


def _turned(stored: StoredTensor, first: int, count: int, tile: Tile) -> _Bytes:
    return np.ascontiguousarray(_rows(stored, first, count, tile.row, tile.row + tile.rows).T)


def _weights(packed: _Bytes, scales: Floats, nibbles: str) -> Floats:
    pair = (_LOW[packed], _HIGH[packed]) if nibbles == LOW_FIRST else (_HIGH[packed], _LOW[packed])
    values = np.stack(pair, -1).reshape(len(packed), -1, 16)
    return np.asarray((values * scales[:, :, None]).reshape(len(packed), -1))


def _e4m3(raw: _Bytes) -> Floats:
    return np.asarray(raw.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def _block_scales(linear: StoredLinear, tile: Tile, blocks: int) -> Iterator[tuple[str, _Bytes]]:
    """Yield the block scales of a tile of the stored matrix, as bytes, in each order that their shape allows.

    Args:
        linear: with block scales.
        tile: of the weight as it is stored.
        blocks: how many a row of it has.
    """
    assert linear.scales is not None
    held, rows = linear.scales, linear.codes.shape[0]
    first, count = tile.column // linear.block, tile.columns // linear.block
    if len(held.shape) == 2 and held.shape[0] >= rows and held.shape[1] >= blocks:
        yield ROW_MAJOR, _rows(linear.scales, tile.row, tile.rows, first, first + count)
    wide = swizzled_shape(rows, blocks)[1]
    more = len(held.shape) == 2 and held.shape[0] >= rows and held.shape[1] >= wide  # padded by more than the tiles ask
    if more and held.shape[0] % 128 == 0 and held.shape[1] % 4 == 0:
        wide = held.shape[1]
    elif held.shape not in swizzled_shapes(rows, blocks):
        wide = 0
    if wide:
        yield TILES, _from_tiles(linear.scales, wide // 4, tile.row, tile.rows, first, count)
    if held.shape == (blocks, rows):
        yield TRANSPOSED, _turned(linear.scales, first, count, tile)


def _from_tiles(stored: StoredTensor, across: int, row: int, rows: int, column: int, columns: int) -> _Bytes:
    """Read block scales out of tiles of 128 rows and 4 columns, `across` of which lie side by side."""
    left, right = column // 4, -(-(column + columns) // 4)
    bands = [
        unswizzled(stored.bytes((band * across + left) * 512, (band * across + right) * 512), 128, (right - left) * 4)
        for band in range(row // 128, -(-(row + rows) // 128))
    ]
    top, begin = row - row // 128 * 128, column - 4 * left
    return np.ascontiguousarray(np.concatenate(bands)[top : top + rows, begin : begin + columns])


def _fp8_readings(linear: StoredLinear, shape: tuple[int, int], tile: Tile) -> Iterator[tuple[Reading, Floats]]:
    for orientation, where, (rows, columns) in (("rows", tile, shape), ("transposed", tile.turned, shape[::-1])):
        if not _holds(linear.codes.shape, rows, columns):
            continue
        raw = _rows(linear.codes, where.row, where.rows, where.column, where.column + where.columns)
        for number, kind in _FP8.items():
            value = np.asarray(raw.view(kind).astype(np.float32))
            yield Reading(number, orientation, NONE, NONE), value if where is tile else value.T


def _mxfp8_readings(linear: StoredLinear, shape: tuple[int, int], tile: Tile) -> Iterator[tuple[Reading, Floats]]:
    """Yield a tile of a weight in MXFP8, whose rows are stored as rows; a turned one has no reading."""
    if not _holds(linear.codes.shape, *shape):
        return
    raw = _rows(linear.codes, tile.row, tile.rows, tile.column, tile.column + tile.columns)
    for order, scales in _block_scales(linear, tile, linear.codes.shape[1] // _MX_BLOCK):
        steps = np.repeat(_POWERS[scales], _MX_BLOCK, axis=1)
        for number, kind in _FP8.items():
            yield Reading(number, "rows", order, NONE), np.asarray(raw.view(kind).astype(np.float32) * steps)
