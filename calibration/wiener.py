"""The weight that makes the best of an input that is rounded: a part of the way to the Wiener estimate.

A linear is to give ``W x`` and reads ``q``, which is ``x`` rounded to FP4. Rounding is noise that hardly depends on the
signal, while the signal's channels depend on each other, so that a linear estimate of ``x`` from ``q`` is nearer to it
than ``q`` itself: ``T = E[x q^T] E[q q^T]^-1``, and ``W T q`` has the least squared error (Wiener). But it weakens the
weak directions of the signal, and in every call of the model the same way, which costs an image more than noise that
differs from call to call. So only a share of the way is gone, and each row is scaled so that its output, regressed on
what it should be, has the slope 1.
"""

from __future__ import annotations

import torch

from calibration.input_statistics import Moments

__all__ = ["wiener_target"]

_SLOPES = (0.8, 1.25)
"""Within which a row is scaled; beyond them the statistics say nothing."""


def wiener_target(weight: torch.Tensor, moments: Moments, share: float, damping: float) -> torch.Tensor:
    """Return the weight to be rounded, FP32 [N, K].

    Args:
        weight: W, FP32 [N, K].
        moments: of the input, with ``cross`` and ``plain``.
        share: of the way from W to the Wiener estimate, 0 to 1.
        damping: of the second moments' diagonal, relative to its mean.
    """
    if not share:
        return weight
    assert moments.cross is not None
    assert moments.plain is not None
    mean, rounded = moments.total / moments.count, moments.rounded / moments.count
    cross = moments.cross / moments.count - torch.outer(mean, rounded)
    plain = moments.plain / moments.count - torch.outer(mean, mean)
    covariance = moments.covariance
    covariance.diagonal().add_(damping * covariance.diagonal().mean())
    root = torch.linalg.cholesky(covariance.double())
    estimate = torch.cholesky_solve((weight @ cross).T.double(), root).T.float()
    target = weight + share * (estimate - weight)
    slope = ((target @ cross.T) * weight).sum(dim=1) / ((weight @ plain) * weight).sum(dim=1)
    return target / slope.nan_to_num(1.0).clamp(*_SLOPES).unsqueeze(1)
