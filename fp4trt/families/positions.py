"""Positions of tokens, as the models of several families count them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["counted", "grid"]


def grid(tokens: int, axes: int, row: int) -> npt.NDArray[np.float32]:
    """Return the positions of a picture's tokens, FP32 [tokens, axes]: a picture as square as the number allows.

    Args:
        tokens: of the picture.
        axes: of a position.
        row: which axis counts rows; the next one counts columns, all others are 0.
    """
    import numpy as np

    width = next(n for n in range(int(tokens**0.5), 0, -1) if tokens % n == 0)
    ids = np.zeros((tokens, axes), np.float32)
    ids[:, row], ids[:, row + 1] = np.divmod(np.arange(tokens), width)
    return ids


def counted(tokens: int, axes: int, axis: int | None = None) -> npt.NDArray[np.float32]:
    """Return the positions of a text's tokens, FP32 [tokens, axes]: counted along an axis, or all 0."""
    import numpy as np

    ids = np.zeros((tokens, axes), np.float32)
    if axis is not None:
        ids[:, axis] = np.arange(tokens)
    return ids
