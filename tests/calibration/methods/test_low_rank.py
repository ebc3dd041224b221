"""The branch that takes out of a weight what FP4 would round worst."""

from __future__ import annotations

import pytest
import torch

from calibration.by_block.input_statistics import observe_moments
from calibration.methods.quality.low_rank import importance, low_rank, truncated_svd
from calibration.recipes.recipe import Quality


def _matrix(rows: int, columns: int, decay: float) -> torch.Tensor:
    """A matrix whose singular values fall as ``index ** -decay``, with some outliers."""
    random = torch.Generator().manual_seed(rows)
    left, right = (torch.linalg.qr(torch.randn(n, n, generator=random))[0] for n in (rows, columns))
    count = min(rows, columns)
    values = torch.arange(1, count + 1, dtype=torch.float32) ** -decay
    matrix = (left[:, :count] * values) @ right[:count]
    matrix.view(-1)[:: rows * columns // 7] *= 30
    return matrix


@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(96, 160, 8), (160, 96, 24), (48, 64, 48), (512, 384, 32)])
def test_the_randomized_decomposition_holds_nearly_as_much_as_the_exact_one(
    rows: int, columns: int, rank: int, decay: float
) -> None:
    matrix = _matrix(rows, columns, decay)
    left, values, right = truncated_svd(matrix, rank)
    assert (left.shape, values.shape, right.shape) == ((rows, rank), (rank,), (rank, columns))
    best = torch.linalg.svdvals(matrix.double())[:rank].square().sum()
    whole = matrix.double().square().sum()
    lost = (matrix - (left * values) @ right).double().square().sum() - (whole - best)
    assert -1e-5 * whole < lost < 2e-3 * whole
    for basis in (left.T, right):
        assert torch.allclose(basis @ basis.T, torch.eye(rank), atol=1e-4)
    again = truncated_svd(matrix, rank)
    assert all(torch.equal(one, other) for one, other in zip((left, values, right), again, strict=True))


def test_a_matrix_of_a_low_rank_is_taken_out_whole() -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 4, generator=random) @ torch.randn(4, 96, generator=random)
    branch = low_rank(weight, torch.rand(96, generator=random) + 0.1, 4)
    assert float((weight - branch.product()).norm() / weight.norm()) < 0.01  # what BF16 leaves
    assert torch.allclose(branch.a.float().norm(dim=1), torch.ones(4), atol=0.01)


def test_columns_that_cost_more_are_kept_better() -> None:
    weight = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    scale = torch.ones(96)
    scale[:6] = 20
    left = weight - low_rank(weight, scale, 8).product()
    assert float(left[:, :6].norm() / weight[:, :6].norm()) < 0.1
    assert float(left[:, 6:].norm() / weight[:, 6:].norm()) > 0.9
    even = weight - low_rank(weight, torch.ones(96), 8).product()
    assert float((left * scale).norm()) < float((even * scale).norm())


def test_the_noise_and_power_of_channels_are_those_of_the_rows() -> None:
    rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) + 3
    rounded = (rows * 4).round() / 4
    module = torch.nn.Linear(32, 8)
    with observe_moments({"": module}, {"": lambda _: rounded}, 500) as found, torch.no_grad():
        module(rows)
    power, noise = found[""].power_and_noise()
    assert torch.allclose(noise, (rows - rounded).var(dim=0, correction=0), rtol=0.02)
    assert torch.allclose(power, rounded.var(dim=0, correction=0), rtol=0.01)
    assert (importance(noise, power) > 0).all()
    assert (importance(torch.zeros(4), torch.zeros(4)) > 0).all()


def test_a_groups_rank_is_pooled_and_rounded_up_on_request() -> None:
    assert [Quality(name="quality", rank=8).pooled(members) for members in (1, 3, 4)] == [8, 24, 32]
    rounded = Quality(name="quality", rank=8, rank_multiple=32)
    assert [rounded.pooled(members) for members in (1, 3, 4, 5)] == [32, 32, 32, 64]
    assert Quality(name="quality").pooled(3) == 0
