"""The Frechet distance between two sets of images, in a network's features (Heusel et al. 2017, arXiv:1706.08500)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from generation.comparison.statistics import Scores, jackknife

__all__ = ["FEWEST", "frechet_distance", "frechet_scores"]

FEWEST: Final = 3
"""Images that its scores need: a covariance is of two, and its interval leaves one out."""

_QUICK: Final = 128
"""Up to so many features, leaving out each image by itself takes about a millisecond."""

_GROUPS: Final = 20

_Features = npt.NDArray[np.float64]


def frechet_distance(first: _Features, second: _Features) -> float:
    """Return the Frechet distance of the normal distributions fitted to two sets of features, each FP64 [N, D], N > 1.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))``; the last trace is that of the root of ``L S2 L`` with ``L`` the
    root of S1, which is symmetric, so that rounding cannot make it complex.
    """
    distance = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    one, two = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ two @ root).clip(min=0)).sum()
    return float(distance + np.trace(one) + np.trace(two) - 2 * shared)


def frechet_scores(features: Sequence[_Features], references: Sequence[_Features]) -> Scores:
    """Return the scores of the distance of each seed's images to the reference's of the same seed, both [N, D].

    N is at least :data:`FEWEST`.
    """
    groups = None if features[0].shape[1] <= _QUICK else _GROUPS
    return jackknife(
        [len(one) for one in features],
        lambda seed, kept: frechet_distance(features[seed][kept], references[seed][kept]),
        groups,
    )
