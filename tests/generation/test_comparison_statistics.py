"""Intervals of a comparison, and the Frechet distance, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from generation.comparison.frechet import frechet_distance, frechet_scores
from generation.comparison.statistics import Scores, difference, estimate, jackknife, scores_of


def test_one_seeds_interval_is_students():
    from scipy.stats import t

    values = np.random.default_rng(0).normal(5, 2, (1, 40))
    low, high = t.interval(0.95, 39, loc=values.mean(), scale=values.std(ddof=1) / np.sqrt(40))
    found = estimate(scores_of(values))
    assert (found.low, found.high, found.spread) == (pytest.approx(low), pytest.approx(high), None)


def test_a_paired_difference_is_scipys_paired_test():
    from scipy.stats import ttest_rel

    random = np.random.default_rng(1)
    one = random.normal(0, 5, (1, 30))
    other = one + random.normal(0.3, 0.5, (1, 30))
    interval = ttest_rel(other[0], one[0]).confidence_interval(0.95)
    found = difference(scores_of(other), scores_of(one))
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    apart = estimate(scores_of(other)).mean - estimate(scores_of(one)).mean
    assert found.mean == pytest.approx(apart)
    assert found.is_significant


def test_what_differs_between_seeds_as_a_whole_widens_no_interval_but_is_told_as_spread():
    values = np.random.default_rng(2).normal(0, 1, (3, 50))
    moved = values + np.array([[0.0], [10.0], [20.0]])
    assert estimate(scores_of(moved)).half_width == pytest.approx(estimate(scores_of(values)).half_width)
    assert estimate(scores_of(moved)).spread == pytest.approx(10, abs=0.5)


def test_the_interval_holds_the_truth_about_95_times_of_100():
    random = np.random.default_rng(3)
    held = [estimate(scores_of(random.normal(1, 2, (3, 20)))) for _ in range(1000)]
    assert 0.93 < np.mean([one.low < 1 < one.high for one in held]) < 0.97


def test_one_image_has_no_interval():
    found = estimate(scores_of(np.array([[3.0]])))
    assert (found.mean, found.low, found.high, found.half_width, found.is_significant) == (3, None, None, None, False)


def test_the_jackknife_of_a_mean_is_the_images_themselves():
    values = np.random.default_rng(4).normal(0, 1, (2, 15))
    found = jackknife([15, 15], lambda seed, kept: float(values[seed][kept].mean()))
    assert np.allclose(found.values, values)
    assert np.allclose(found.figures, values.mean(axis=1))


def test_the_jackknife_of_groups_gives_one_value_a_group():
    values = np.random.default_rng(5).normal(0, 1, (1, 17))
    found = jackknife([17], lambda seed, kept: float(values[seed][kept].mean()), groups=4)
    assert found.values.shape == (1, 4)
    assert found.figures == pytest.approx(values.mean())


def test_the_frechet_distance_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    random = torch.Generator().manual_seed(0)
    one, other = (torch.randn(60, 1, 4, 4, generator=random) * scale for scale in (1.0, 1.5))

    class Flat(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.flatten(1)

    witness = fid.FrechetInceptionDistance(feature=Flat(), normalize=True)
    witness.update(one, real=True)
    witness.update(other, real=False)
    ours = frechet_distance(*(each.flatten(1).double().numpy() for each in (one, other)))
    assert ours == pytest.approx(float(witness.compute()), rel=1e-4)


def test_the_frechet_distance_of_normals_is_the_formulas():
    random = np.random.default_rng(6)
    one, other = random.normal(0, 1, (200_000, 1)), random.normal(3, 2, (200_000, 1))
    assert frechet_distance(one, other) == pytest.approx(3**2 + (1 - 2) ** 2, rel=0.02)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_a_frechet_distance_with_features_that_are_always_zero_is_finite():
    features = np.zeros((10, 5))
    features[:, 0] = np.arange(10)
    scores = frechet_scores([features + 1], [features])
    assert scores.figures == pytest.approx([5])
    assert scores.values.shape == (1, 10)


def test_a_difference_of_the_same_scores_is_nothing():
    scores = Scores(np.array([1.0, 2.0]), np.array([[1.0, 1.0], [2.0, 2.0]]))
    found = difference(scores, scores)
    assert (found.mean, found.low, found.high) == (0, 0, 0)
    assert not found.is_significant
