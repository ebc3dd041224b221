"""The weight for a rounded input: the definition, by regression on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from calibration.by_block.input_statistics import Moments, observe_moments
from calibration.formats import nvfp4
from calibration.methods.quality import gptq
from calibration.methods.quality.wiener import wiener_target

ROWS, K, N = 4000, 64, 24


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Rows whose channels depend on each other, with a mean."""
    random = torch.Generator().manual_seed(0)
    few = torch.randn(ROWS, 12, generator=random) @ torch.randn(12, K, generator=random)
    return few + 0.3 * torch.randn(ROWS, K, generator=random) + torch.randn(K, generator=random)


@pytest.fixture(scope="module")
def q(x: torch.Tensor) -> torch.Tensor:
    return nvfp4.fake_quantize(x, nvfp4.global_scale(x.abs().max()))


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


def _moments(x: torch.Tensor, q: torch.Tensor) -> Moments:
    rounded = iter((q,))
    module = torch.nn.Linear(K, N)
    with observe_moments({"": module}, {"": lambda _: next(rounded)}, ROWS, with_lost=True) as found, torch.no_grad():
        module(x)
    return found[""]


def _target(weight: torch.Tensor, x: torch.Tensor, q: torch.Tensor, share: float, damping: float) -> torch.Tensor:
    moments = _moments(x, q)
    _, noise = moments.power_and_noise()
    covariance = moments.into_covariance()
    added = damping * float(covariance.diagonal().mean())
    covariance.diagonal().add_(added)
    return wiener_target(weight, moments.into_lost_covariance(), noise, gptq.root(covariance), added, share)


def _centered(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.mean(dim=0)).double()


def _error(target: torch.Tensor, x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> float:
    wanted = _centered(x) @ weight.double().T
    return float((_centered(q) @ target.double().T - wanted).norm() / wanted.norm())


def test_the_whole_way_is_the_regression_of_the_output_on_the_rounded_input(
    x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor
) -> None:
    found = _target(weight, x, q, 1, 1e-6).double()
    regressed = torch.linalg.lstsq(_centered(q), _centered(x) @ weight.double().T).solution.T
    directions = (found / found.norm(dim=1, keepdim=True), regressed / regressed.norm(dim=1, keepdim=True))
    torch.testing.assert_close(*directions, atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.3, 1])
def test_no_row_is_weakened(share: float, x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> None:
    wanted = _centered(x) @ weight.double().T
    given = _centered(q) @ _target(weight, x, q, share, 0.01).double().T
    slopes = (given * wanted).sum(dim=0) / wanted.square().sum(dim=0)
    torch.testing.assert_close(slopes, torch.ones_like(slopes), atol=8e-3, rtol=0)


def test_a_part_of_the_way_gives_a_part_of_the_gain(x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> None:
    part, whole = (_error(_target(weight, x, q, share, 0.01), x, q, weight) for share in (0.3, 1))
    assert part < 0.95 * _error(weight, x, q, weight)
    assert whole < part


def test_a_direction_that_no_row_had_keeps_its_weight(x: torch.Tensor, weight: torch.Tensor) -> None:
    few, damping = x[:20], 0.1
    q = nvfp4.fake_quantize(few, nvfp4.global_scale(few.abs().max()))
    found = _target(weight, few, q, 0.3, damping).double()
    unseen = torch.linalg.svd(_centered(q)).Vh[19:].T  # 20 rows less their mean have 19 directions
    kept, had = found @ unseen, weight.double() @ unseen
    slopes = (kept * had).sum(dim=1, keepdim=True) / had.square().sum(dim=1, keepdim=True)
    torch.testing.assert_close(kept, slopes * had, atol=1e-4, rtol=0)
    assert slopes.min() > 0.95


def test_few_rows_and_many_are_moved_alike(x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> None:
    many = weight.repeat(3 * K // N, 1)
    torch.testing.assert_close(_target(weight, x, q, 0.3, 0.01), _target(many, x, q, 0.3, 0.01)[:N])


def test_a_channel_that_is_always_zero_harms_nothing(x: torch.Tensor, weight: torch.Tensor) -> None:
    dead = x.clone()
    dead[:, :16] = 0
    assert _target(weight, dead, dead, 0.3, 0.01).isfinite().all()
    assert _target(torch.zeros_like(weight), dead, dead, 0.3, 0.01).eq(0).all()
