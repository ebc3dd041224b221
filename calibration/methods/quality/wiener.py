"""The weight that makes the best of an input that is rounded: a part of the way to the Wiener estimate.

A linear is to give ``W x`` and reads ``q``, which is ``x`` rounded to FP4. Rounding is noise that hardly depends on the
signal, while the signal's channels depend on each other, so that a linear estimate of ``x`` from ``q`` is nearer to it
than ``q`` itself: ``T = I + E[(x - q) q^T] E[q q^T]^-1``, and ``W T q`` has the least squared error (Wiener). Where
calibration saw no input, T is the identity: damping what is inverted takes nothing of the weight away. But T weakens
the weak directions of the signal, and in every call of the model the same way, which costs an image more than noise
that differs from call to call. We therefore move only the fraction ``share`` of the way, then rescale each row so that
regressing its output on what is wanted gives slope 1.

Of a row's slope only the distance from 1 matters, a few hundredths: the moments of its output are measured on some
random inputs, and the noise of one channel is taken to be independent of the others'.
"""

from __future__ import annotations

from typing import Final

import torch

from calibration.methods.quality.gptq import Root

__all__ = ["wiener_target"]

_SLOPES: Final = (0.8, 1.25)
"""Within which a row is scaled; beyond them the statistics say nothing."""

_PROBES: Final = 256
"""Random inputs with the moments that there are, on which the moments of a row's output are measured: its power within
9 % for two rows of three. The slope's distance from 1, a few hundredths, is off by about as much of itself."""


def wiener_target(
    weight: torch.Tensor, lost: torch.Tensor, noise: torch.Tensor, root: Root, damping: float, share: float
) -> torch.Tensor:
    """Return the weight to be rounded, FP32 [N, K].

    Args:
        weight: W, FP32 [N, K].
        lost: covariance of ``x - q`` and ``q``, FP32 [K, K].
        noise: variance of ``x - q`` by channel, FP32 [K].
        root: of the covariance of ``q``, damped.
        damping: what has been added to its diagonal.
        share: of the way from W to the Wiener estimate, above 0, to 1.
    """
    rows, columns = weight.shape
    moved = weight @ root.solve(lost) if rows > columns else root.solve(weight @ lost)  # the cheaper order
    moved.mul_(share)
    random = torch.randn(columns, _PROBES, generator=torch.Generator().manual_seed(0)).to(weight.device)
    inputs = root.rows @ (root.weights.unsqueeze(1) * random)
    given, change = weight @ inputs, moved @ inputs
    by_row = torch.linalg.vecdot
    damped = damping * by_row(weight, weight)
    power = given.square().mean(dim=1) - damped  # of W q
    crossed = (given * change).mean(dim=1) / share  # of W (x - q) and W q
    meant = power + (1 + share) * crossed + change.square().mean(dim=1) / share - damping * by_row(weight, moved)
    slope = meant / (power + 2 * crossed + weight.square() @ noise)
    slope = torch.where(power > damped, slope, 1.0)  # else the damping's share of the measured power hides the row's
    return moved.add_(weight).div_(slope.nan_to_num(1.0).clamp(*_SLOPES).unsqueeze(1))
