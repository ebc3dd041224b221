"""A low-rank branch in BF16 that takes out of a weight what FP4 would round worst.

The linear becomes ``R q + B A x``: the FP4 product of the residual ``R = W - B A`` with the rounded input ``q``, and
two small products of the input ``x`` itself (Li et al., SVDQuant, arXiv:2411.05007). What rounding costs an output
grows with ``R S``, S being a diagonal: a column of R multiplies the rounding noise of its channel of the input, and its
own rounding is multiplied by that channel, in power a fixed share of it. The branch is therefore the truncated singular
value decomposition of ``W S``, brought back by the inverse of S.

The decomposition is randomized (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4): subspace iteration
from a seeded start, O(N K rank) a step, until a step adds next to nothing to the power that the subspace holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

__all__ = ["LowRank", "importance", "low_rank", "truncated_svd"]

_ROUNDING_POWER: Final = 0.0085
"""Squared relative error of a weight rounded to NVFP4 (measured: 9.2 % of its L2 norm)."""

_OVERSAMPLED: Final = 16
_STEPS: Final = 32
_GAIN: Final = 1e-5
"""Relative growth of the power held, below which a further step of the iteration is not worth it."""


@dataclass(frozen=True)
class LowRank:
    """A branch ``B A``.

    Attributes:
        a: first factor, BF16 [rank, K]; its rows have about the length 1.
        b: second factor, BF16 [N, rank].
    """

    a: torch.Tensor
    b: torch.Tensor

    def product(self) -> torch.Tensor:
        """Return what the branch takes out of the weight, FP32 [N, K]."""
        return self.b.float() @ self.a.float()


def importance(noise: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """Return how much an error of each column of a weight costs, above 0.

    Args:
        noise: variance of what rounding changes of each channel of the input, FP32 [K].
        power: variance of each channel of the rounded input, FP32 [K].

    Returns:
        FP32 [K], a standard deviation.
    """
    cost = noise + _ROUNDING_POWER * power
    return (cost + 1e-6 * cost.mean() + torch.finfo(cost.dtype).tiny).sqrt()


def low_rank(weight: torch.Tensor, scale: torch.Tensor, rank: int) -> LowRank:
    """Return the branch of a weight.

    Args:
        weight: FP32 [N, K].
        scale: :func:`importance` of its columns, FP32 [K].
        rank: at most min(N, K).
    """
    left, values, rows = truncated_svd(weight * scale, rank)
    a, b = rows / scale, left * values
    length = a.norm(dim=1, keepdim=True)
    return LowRank((a / length).bfloat16(), (b * length.T).bfloat16())


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the largest singular values of a matrix with their vectors, nearly: U [N, rank], S [rank], V^T [rank, K].

    Args:
        matrix: FP32 [N, K].
        rank: at most min(N, K).
    """
    size = min(rank + _OVERSAMPLED, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], size, generator=generator).to(matrix.device)
    basis, held = torch.linalg.qr(matrix @ start)[0], 0.0
    for _ in range(_STEPS):
        image = matrix @ torch.linalg.qr(matrix.T @ basis)[0]
        basis = torch.linalg.qr(image)[0]
        power = float(torch.linalg.svdvals(image)[:rank].square().sum())
        if power <= held * (1 + _GAIN):
            break
        held = power
    left, values, rows = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], rows[:rank]
