"""The weight that makes the best of an input that is rounded: a part of the way to the Wiener estimate.

A linear is to give ``W x`` and reads ``q``, which is ``x`` rounded to FP4. Rounding is noise that hardly depends on the
signal, while the signal's channels depend on each other, so that a linear estimate of ``x`` from ``q`` is nearer to it
than ``q`` itself: ``T = E[x q^T] E[q q^T]^-1``, and ``W T q`` has the least squared error (Wiener). But it weakens the
weak directions of the signal, and in every call of the model the same way, which costs an image more than noise that
differs from call to call. We therefore move only the fraction ``share`` of the way, then rescale each row so that
regressing its output on the target gives slope 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Correlated", "correlate", "wiener_target"]

_SLOPES = (0.8, 1.25)
"""Within which a row is scaled; beyond them the statistics say nothing."""


@dataclass(frozen=True)
class Correlated:
    """How the output that is wanted goes with the rounded input.

    Attributes:
        with_rounded: covariance of ``W x`` and ``q``, FP32 [N, K].
        power: variance of ``W x``, FP32 [N].
    """

    with_rounded: torch.Tensor
    power: torch.Tensor


def correlate(weight: torch.Tensor, cross: torch.Tensor, plain: torch.Tensor) -> Correlated:
    """Return what is to be known of the inputs for a weight.

    Args:
        weight: W, FP32 [N, K].
        cross: covariance of ``x`` and ``q``, FP32 [K, K].
        plain: of ``x`` and ``x``, FP32 [K, K].
    """
    return Correlated(weight @ cross, ((weight @ plain) * weight).sum(dim=1))


def wiener_target(weight: torch.Tensor, wanted: Correlated, feedback: torch.Tensor, share: float) -> torch.Tensor:
    """Return the weight to be rounded, FP32 [N, K].

    Args:
        weight: W, FP32 [N, K].
        wanted: of it.
        feedback: :func:`calibration.methods.quality.gptq.inverse_root` of the covariance of ``q``, FP32 [K, K].
        share: of the way from W to the Wiener estimate, 0 to 1.
    """
    estimate = wanted.with_rounded @ feedback.T @ feedback
    target = weight + share * (estimate - weight)
    slope = (target * wanted.with_rounded).sum(dim=1) / wanted.power
    return target / slope.nan_to_num(1.0).clamp(*_SLOPES).unsqueeze(1)
