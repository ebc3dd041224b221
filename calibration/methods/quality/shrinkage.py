"""Covariances from few rows: how much of what lies off the diagonal is chance, and taking that away.

Where an input has not many more rows than directions, channels seem to depend on each other by chance, and what GPTQ
and the Wiener estimate make of that is wrong for every other input. So each covariance is shrunk towards its diagonal,
by the share that has the least expected squared error (Schäfer and Strimmer, "A shrinkage approach to large-scale
covariance matrix estimation", 2005), with the variance that entries have for Gaussian rows.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["chance", "shrink"]

_INDEPENDENT: Final = 0.1
"""Share of the rows that count: the tokens of a picture resemble each other, and so do the steps of a trajectory."""

_TOGETHER: Final = 512
"""Rows of a matrix that are held in FP64 at a time."""


def chance(covariance: torch.Tensor, count: int) -> float:
    """Return the share, 0 to 1, of a sample covariance's off-diagonal entries that is best taken for chance.

    Args:
        covariance: FP32 [K, K].
        count: rows that it was measured on.
    """
    own = covariance.diagonal().double()
    squares = float(own.square().sum())
    between = sum(float(rows.double().square().sum()) for rows in covariance.split(_TOGETHER)) - squares
    if between <= 0:
        return 1.0
    variance = (float(own.sum()) ** 2 - squares + between) / (_INDEPENDENT * count)
    return min(1.0, variance / between)


def shrink(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """Take a share of all entries off the diagonal away, in place; return the matrix, FP32 [K, K]."""
    own = matrix.diagonal().clone()
    matrix.mul_(1 - share).diagonal().copy_(own)
    return matrix
