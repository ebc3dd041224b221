"""The weight that makes the best of an input that is rounded: a part of the way to the Wiener estimate.

A linear is to give ``W x`` and reads ``q``, which is ``x`` rounded to FP4. Rounding is noise that hardly depends on the
signal, while the signal's channels depend on each other, so that a linear estimate of ``x`` from ``q`` is nearer to it
than ``q`` itself: ``T = E[x q^T] E[q q^T]^-1``, and ``W T q`` has the least squared error (Wiener). But it weakens the
weak directions of the signal, and in every call of the model the same way, which costs an image more than noise that
differs from call to call. We therefore move only the fraction ``share`` of the way, then rescale each row so that
regressing its output on what is wanted gives slope 1.

A row's slope is its distance from 1 that matters, a few hundredths: the power of its output is measured on some random
inputs, and the noise of one channel taken to be none of the others' noise.
"""

from __future__ import annotations

from typing import Final

import torch

from calibration.methods.quality.gptq import Root

__all__ = ["wiener_target"]

_SLOPES: Final = (0.8, 1.25)
"""Within which a row is scaled; beyond them the statistics say nothing."""

_PROBES: Final = 256
"""Random inputs with the moments that there are, on which a row's power is measured: within 9 % for two rows of three.
The slope's distance from 1, a few hundredths, is off by as much of itself."""


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
        share: of the way from W to the Wiener estimate, 0 to 1.
    """
    gone = weight @ lost  # W E[x q^T] is W H and this
    by_row = torch.linalg.vecdot
    own, crossed = by_row(weight, weight), by_row(gone, weight)
    gone.sub_(weight, alpha=damping)
    moved = root.solve(gone).mul_(share)
    power = _power(weight, root) - damping * own  # of W q
    given = power + crossed + share * (crossed - damping * own) + by_row(gone, moved)
    slope = given / (power + 2 * crossed + weight.square() @ noise)
    return moved.add_(weight).div_(slope.nan_to_num(1.0).clamp(*_SLOPES).unsqueeze(1))


def _power(weight: torch.Tensor, root: Root) -> torch.Tensor:
    """Return the mean square of each output for inputs with these moments, nearly: FP32 [N]."""
    random = torch.randn(len(root.weights), _PROBES, generator=torch.Generator().manual_seed(0)).to(weight.device)
    inputs = root.rows @ (root.weights.unsqueeze(1) * random)
    return (weight @ inputs).square().mean(dim=1)
