"""GPTQ and coordinate descent against what they are by definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from calibration.formats import nvfp4
from calibration.methods.quality import gptq

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def _problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, the moments of correlated inputs, and the weight's global scale."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random)
    mixing = torch.randn(columns, columns, generator=random) + 2 * torch.eye(columns)
    inputs = torch.randn(400, columns, generator=random) @ mixing
    moments = inputs.T @ inputs / len(inputs)
    return (
        weight,
        moments + 0.01 * moments.diagonal().mean() * torch.eye(columns),
        nvfp4.global_scale(weight.abs().max()),
    )


def _slowly(row: torch.Tensor, moments: torch.Tensor, scale: float) -> list[float]:
    """Round one row by the textbook: after each column, the rest of the row is moved to where it costs least."""
    left = row.double().clone()
    columns, rounded = len(row), []
    for begin in range(0, columns, 16):
        amax = left[begin : begin + 16].abs().max().float()
        usual = int(nvfp4.block_scales(amax, torch.tensor(scale)).view(torch.uint8))
        tries = []
        for bits in (min(max(usual + step, 1), 126) for step in range(-2, 7)):
            trial, values, cost = left.clone(), [], 0.0
            step = torch.tensor(float(E4M3[bits].float() * torch.tensor(scale)))
            for column in range(begin, begin + 16):
                value = float(nvfp4.values_under(trial[column].float(), step))
                rest = list(range(column, columns))
                inverse = torch.linalg.inv(moments.double()[rest][:, rest])
                error = float(trial[column]) - value
                cost += error**2 / float(inverse[0, 0])
                trial[column + 1 :] -= error * inverse[0, 1:] / inverse[0, 0]
                values.append(value)
            tries.append((cost, values, trial))
        _, values, left = min(tries, key=lambda each: each[0])
        rounded += values
    return rounded


@pytest.mark.parametrize("panel", [32, 256])
def test_feedback_is_that_of_the_textbook_column_by_column(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_PANEL", panel)
    weight, moments, scale = _problem(5, 48)
    found = gptq.round_with_feedback(weight, gptq.root(moments), scale)
    expected = torch.tensor([_slowly(row, moments, float(scale)) for row in weight])
    assert torch.equal(found.values, expected)


def test_a_root_is_that_of_the_moments_and_solves_with_them() -> None:
    weight, moments, _ = _problem(5, 64)
    root = gptq.root(moments)
    torch.testing.assert_close((root.rows * root.weights.square()) @ root.rows.T, moments)
    torch.testing.assert_close(root.rows.tril(), torch.eye(64))
    torch.testing.assert_close(root.solve(weight) @ moments, weight, atol=1e-4, rtol=1e-4)


def test_a_root_that_fp32_would_change_too_much_is_computed_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    _, moments, _ = _problem(5, 64)
    exact = torch.linalg.cholesky(moments.double().flip(0, 1)).flip(0, 1).diagonal().float()
    assert not torch.equal(gptq.root(moments).weights, exact)
    monkeypatch.setattr(gptq, "_CHANGED", 0)
    assert torch.equal(gptq.root(moments).weights, exact)


def test_descent_in_several_panels_finds_what_it_finds_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments, scale = _problem(24, 96)
    start = gptq.round_with_feedback(weight, gptq.root(moments), scale)
    whole = gptq.descend(weight, moments, scale, start, 2)
    monkeypatch.setattr(gptq, "_PANEL", 32)
    assert torch.equal(gptq.descend(weight, moments, scale, start, 2).values, whole.values)


@pytest.mark.parametrize("seed", range(3))
def test_feedback_and_descent_each_lower_the_error_of_the_output(seed: int) -> None:
    weight, moments, scale = _problem(24, 96, seed)
    start = gptq.round_with_feedback(weight, gptq.root(moments), scale)
    end = gptq.descend(weight, moments, scale, start, 8)
    errors = [gptq.error(each.values, weight, moments) for each in (gptq.plain(weight, scale), start, end)]
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.97 * errors[1]


def test_after_descent_no_other_code_of_one_weight_is_better() -> None:
    weight, moments, scale = _problem(3, 32)
    end = gptq.descend(weight, moments, scale, gptq.round_with_feedback(weight, gptq.root(moments), scale), 50)
    least = gptq.error(end.values, weight, moments)
    steps = end.scales.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale
    for row, column in itertools.product(range(3), range(32)):
        for magnitude in nvfp4.E2M1_VALUES:
            for value in (magnitude, -magnitude):
                other = end.values.clone()
                other[row, column] = value * steps[row, column // 16]
                assert gptq.error(other, weight, moments) >= least * (1 - 1e-5), (row, column, value)


def test_what_is_stored_dequantizes_to_the_values() -> None:
    weight, moments, scale = _problem(8, 64)
    found = gptq.descend(weight, moments, scale, gptq.round_with_feedback(weight, gptq.root(moments), scale), 2)
    packed, scales = found.stored(scale)
    assert packed.shape == (8, 32)
    assert torch.equal(nvfp4.dequantize(nvfp4.unpack_codes(packed), scales, scale), found.values)


def test_a_weight_of_zeros_and_one_tiny_row_stay_finite() -> None:
    weight, moments, scale = _problem(4, 32)
    weight[1] = 0
    weight[2] *= 1e-20
    found = gptq.descend(weight, moments, scale, gptq.round_with_feedback(weight, gptq.root(moments), scale), 2)
    assert found.values.isfinite().all()
    assert not found.values[1].any()
