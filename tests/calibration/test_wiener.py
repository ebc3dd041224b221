"""The weight for a rounded input: the definition, by regression on the rows themselves."""

from __future__ import annotations

import pytest
import torch

from calibration import nvfp4
from calibration.input_statistics import Moments, observe_moments
from calibration.wiener import wiener_target

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


@pytest.fixture(scope="module")
def moments(x: torch.Tensor) -> Moments:
    module = torch.nn.Linear(K, N)
    round_input = {"": lambda rows: nvfp4.fake_quantize(rows, nvfp4.global_scale(x.abs().max()))}
    with observe_moments({"": module}, round_input, ROWS, with_cross=True) as found, torch.no_grad():
        module(x)
    return found[""]


def _centered(rows: torch.Tensor) -> torch.Tensor:
    return (rows - rows.mean(dim=0)).double()


def _error(target: torch.Tensor, x: torch.Tensor, q: torch.Tensor, weight: torch.Tensor) -> float:
    wanted = _centered(x) @ weight.double().T
    return float((_centered(q) @ target.double().T - wanted).norm() / wanted.norm())


def test_no_share_leaves_the_weight(moments: Moments, weight: torch.Tensor) -> None:
    assert wiener_target(weight, moments, 0, 0.01) is weight


def test_the_whole_way_is_the_regression_of_the_output_on_the_rounded_input(
    x: torch.Tensor, q: torch.Tensor, moments: Moments, weight: torch.Tensor
) -> None:
    found = wiener_target(weight, moments, 1, 1e-9).double()
    regressed = torch.linalg.lstsq(_centered(q), _centered(x) @ weight.double().T).solution.T
    directions = (found / found.norm(dim=1, keepdim=True), regressed / regressed.norm(dim=1, keepdim=True))
    torch.testing.assert_close(*directions, atol=1e-4, rtol=0)


@pytest.mark.parametrize("share", [0.3, 1])
def test_no_row_is_weakened(
    share: float, x: torch.Tensor, q: torch.Tensor, moments: Moments, weight: torch.Tensor
) -> None:
    wanted = _centered(x) @ weight.double().T
    given = _centered(q) @ wiener_target(weight, moments, share, 0.01).double().T
    slopes = (given * wanted).sum(dim=0) / wanted.square().sum(dim=0)
    torch.testing.assert_close(slopes, torch.ones_like(slopes), atol=1e-4, rtol=0)


def test_a_part_of_the_way_gives_a_part_of_the_gain(
    x: torch.Tensor, q: torch.Tensor, moments: Moments, weight: torch.Tensor
) -> None:
    errors = [_error(wiener_target(weight, moments, share, 0.01), x, q, weight) for share in (0, 0.3, 1)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < errors[1]


def test_a_channel_that_is_always_zero_harms_nothing(x: torch.Tensor, weight: torch.Tensor) -> None:
    module = torch.nn.Linear(K, N)
    dead = x.clone()
    dead[:, :16] = 0
    with observe_moments({"": module}, {"": lambda rows: rows}, ROWS, with_cross=True) as found, torch.no_grad():
        module(dead)
    target = wiener_target(weight, found[""], 0.3, 0.01)
    assert target.isfinite().all()
    assert wiener_target(torch.zeros_like(weight), found[""], 0.3, 0.01).eq(0).all()
