"""Covariances from few rows: how much of what lies off the diagonal is chance, and taking that away.

Where an input has not many more rows than directions, channels seem to depend on each other by chance, and what GPTQ
and the Wiener estimate make of that is wrong for every other input. So each covariance is shrunk towards its diagonal,
by the share that has the least expected squared error (Schäfer and Strimmer, "A shrinkage approach to large-scale
covariance matrix estimation", 2005), found from correlations, with the variance that those of Gaussian rows have.
"""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["chance", "shrink"]

_INDEPENDENT: Final = 0.15
"""Share of the rows that count: the tokens of a picture resemble each other, and so do the steps of a trajectory."""

_TOGETHER: Final = 512
"""Rows of a matrix that are held in FP64 at a time."""


def chance(covariance: torch.Tensor, count: int) -> float:
    """Return the share, 0 to 1, of a sample covariance's off-diagonal entries that is best taken for chance.

    It goes by correlations, in which channels count alike, however large their values are; constant ones do not count.

    Args:
        covariance: FP32 [K, K].
        count: rows that it was measured on.
    """
    varies = covariance.diagonal() > 0
    own = torch.where(varies, covariance.diagonal().double().rsqrt(), 0.0)
    squares = fourths = 0.0
    for rows, left in zip(covariance.split(_TOGETHER), own.split(_TOGETHER), strict=True):
        found = (rows.double() * left[:, None] * own).square_().clamp_(max=1.0)
        squares += float(found.sum())
        fourths += float(found.square_().sum())
    alone = int(varies.sum())
    between = squares - alone
    if between <= 0:
        return 1.0
    # the sum over pairs of (1 - r^2)^2, the variance of a correlation r between Gaussian channels
    variance = (alone * (alone - 1) - 2 * between + fourths - alone) / (_INDEPENDENT * count)
    return min(1.0, variance / between)


def shrink(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """Take a share of all entries off the diagonal away, in place; return the matrix, FP32 [K, K]."""
    own = matrix.diagonal().clone()
    matrix.mul_(1 - share).diagonal().copy_(own)
    return matrix
