"""Shrunk covariances: nearer to the truth."""

from __future__ import annotations

import pytest
import torch

from calibration.methods.quality.shrinkage import _INDEPENDENT, chance, shrink

K = 64


def _rows(count: int, directions: int, seed: int) -> torch.Tensor:
    """Independent rows with so many directions among their channels."""
    random = torch.Generator().manual_seed(seed)
    onto = torch.randn(directions, K, generator=torch.Generator().manual_seed(0)) / directions**0.5
    return torch.randn(count, directions, generator=random) @ onto + 0.01 * torch.randn(count, K, generator=random)


@pytest.mark.parametrize(("count", "directions"), [(40, K), (60, K), (60, 4), (4000, 4)])
def test_the_share_is_nearly_the_one_that_is_nearest_to_the_truth(count: int, directions: int) -> None:
    truth = torch.cov(_rows(40_000, directions, 1).T)
    sample = torch.cov(_rows(count, directions, 2).T)
    shares = torch.linspace(0, 1, 101).tolist()
    errors = [float((shrink(sample.clone(), share) - truth).norm()) for share in shares]
    found = chance(sample, round(count / _INDEPENDENT))
    assert float((shrink(sample.clone(), found) - truth).norm()) <= 1.02 * min(errors)
    assert found == pytest.approx(shares[errors.index(min(errors))], abs=0.12)


def test_the_diagonal_stays() -> None:
    sample = torch.cov(_rows(20, K, 2).T)
    assert torch.equal(shrink(sample.clone(), 0.7).diagonal(), sample.diagonal())
    assert torch.equal(shrink(sample.clone(), 1.0), torch.diag(sample.diagonal()))


def test_large_and_constant_channels_do_not_decide() -> None:
    rows = _rows(60, K, 2)
    share = chance(torch.cov(rows.T), len(rows))
    rows[:, :2] *= 1000
    assert chance(torch.cov(rows.T), len(rows)) == pytest.approx(share)
    constant = torch.cat([rows, torch.zeros(len(rows), K)], dim=1)
    assert chance(torch.cov(constant.T), len(rows)) == pytest.approx(share)


def test_what_depends_on_nothing_is_all_chance() -> None:
    assert chance(torch.eye(K), 1000) == 1
    assert chance(torch.zeros(K, K), 1) == 1
