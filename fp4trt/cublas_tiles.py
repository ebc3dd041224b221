"""Block scales in the 128x4 tiles of cuBLAS: rows 32a + b of a tile lie beside each other for each b, four scales each.

Source: the section on the layout of block scaling factors in cuBLAS's documentation.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["swizzled", "unswizzled"]

_Bytes = npt.NDArray[np.uint8]


def swizzled(scales: _Bytes) -> _Bytes:
    """Return block scales in the tiles of cuBLAS, tile after tile, row of tiles after row of tiles.

    Args:
        scales: their bytes in row-major order, [rows, columns], multiples of 128 and 4.

    Returns:
        The same bytes, [rows, columns].
    """
    rows, columns = scales.shape
    tiles = scales.reshape(rows // 128, 4, 32, columns // 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns))


def unswizzled(raw: _Bytes, rows: int, columns: int) -> _Bytes:
    """Return block scales [rows, columns] in row-major order out of the tiles of cuBLAS.

    Args:
        raw: their bytes; the size, a multiple of 128 x 4, is that of `rows` and `columns`.
        rows: a multiple of 128.
        columns: a multiple of 4.
    """
    tiles = raw.reshape(rows // 128, columns // 4, 32, 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns))
