"""Means, spreads and 95 % confidence intervals of what was measured on the same images of several checkpoints.

The images of one seed are a *block*; a metric gives one value per image, ``values[seed, image]``. The mean is that over
the seeds of each seed's own figure. Its interval is Student's t on the values within their blocks: the variance is
pooled over the seeds after each seed's mean is taken out, with ``seeds * (images - 1)`` degrees of freedom. The
interval of a *difference* is the same of the images' differences (a paired t interval with blocks; Box, Hunter and
Hunter, "Statistics for Experimenters", ch. 4): what makes one picture harder than another is in both and cancels.

A figure that is no mean over images, such as a Frechet distance or a ratio of sums, takes part through the jackknife:
its pseudo-value of image i is ``n * figure - (n - 1) * figure without i`` (Tukey 1958), or of a group of images where
leaving out each one would take too long.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["CONFIDENCE", "Estimate", "Scores", "difference", "estimate", "jackknife", "scores_of"]

CONFIDENCE = 0.95

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What one metric says of one checkpoint.

    Attributes:
        figures: [seeds], the metric over the images of each seed.
        values: [seeds, images], each image's part in it: the mean of a row is the figure, for a jackknifed figure
            but for its bias.
    """

    figures: _Array
    values: _Array


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the seeds' figures.
        spread: their standard deviation; None for one seed.
        low: lower end of the 95 % confidence interval of the mean; None where one image is all there is.
        high: upper end.
        per_seed: the figures.
    """

    mean: float
    spread: float | None
    low: float | None
    high: float | None
    per_seed: tuple[float, ...]

    @property
    def half_width(self) -> float | None:
        """Half of the interval, which lies around the mean."""
        return None if self.high is None else self.high - self.mean

    @property
    def is_significant(self) -> bool:
        """Whether the interval, of a difference, leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def scores_of(values: _Array) -> Scores:
    """Return the scores of a metric that is a mean over images: ``values`` [seeds, images]."""
    return Scores(values.mean(axis=1), values)


def estimate(scores: Scores) -> Estimate:
    """Return mean, spread and interval of one checkpoint's scores."""
    return _estimate(scores.figures, scores.values)


def difference(of: Scores, to: Scores) -> Estimate:
    """Return mean, spread and paired interval of ``of - to``, both of the same seeds and images."""
    return _estimate(of.figures - to.figures, of.values - to.values)


def _estimate(figures: _Array, values: _Array) -> Estimate:
    from scipy.stats import t

    mean = float(figures.mean())
    spread = float(figures.std(ddof=1)) if len(figures) > 1 else None
    freedom = values.size - len(values)
    if freedom < 1:
        return Estimate(mean, spread, None, None, tuple(figures.tolist()))
    within = values - values.mean(axis=1, keepdims=True)
    standard_error = float(np.sqrt(np.square(within).sum() / freedom / values.size))
    half = float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * standard_error
    return Estimate(mean, spread, mean - half, mean + half, tuple(figures.tolist()))


def jackknife(
    counts: Sequence[int], figure: Callable[[int, npt.NDArray[np.intp]], float], groups: int | None = None
) -> Scores:
    """Return the scores of a figure over all images of a seed, by leaving out one image, or one group, at a time.

    Args:
        counts: images of each seed, equally many.
        figure: (which seed, which of its images) to the figure over those.
        groups: how many groups of images to leave out in turn; None for each image by itself.
    """
    figures, values = [], []
    for seed, count in enumerate(counts):
        everything = np.arange(count)
        whole = figure(seed, everything)
        parts = min(groups or count, count)
        edges = np.linspace(0, count, parts + 1).round().astype(int)
        left_out = (np.r_[everything[:low], everything[high:]] for low, high in itertools.pairwise(edges))
        pseudo = [parts * whole - (parts - 1) * figure(seed, kept) for kept in left_out] if parts > 1 else [whole]
        figures.append(whole)
        values.append(pseudo)
    return Scores(np.array(figures), np.array(values))
