"""Both forms of the inner loops of GPTQ and descent, in torch and compiled, give the same bits."""

from __future__ import annotations

import pytest
import torch

from calibration.methods.quality import column_rounding, gptq

Problem = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _problem(rows: int, seed: int) -> Problem:
    """Return a block of weights, what one is worth under some scales, and moments; with zeros and tiny numbers."""
    random = torch.Generator().manual_seed(seed)
    block = torch.randn(rows, 16, generator=random)
    step = 0.05 + 0.5 * torch.rand(5, rows, generator=random)
    block[0], block[1] = 0, -0.0
    block[2] *= 1e-20
    step[:, 2] *= 1e-20
    step[3, 3:5] = 0  # a scale so small that its product with the global one is none
    block[5] *= 1e6  # beyond what the step can hold
    inputs = torch.randn(40, 16, generator=random)
    return block, step, inputs.T @ inputs / 40


def _feed_back(rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return what :func:`column_rounding.feed_back` takes."""
    block, step, moments = _problem(rows, seed)
    root = gptq.root(moments)
    return block, 0.1 * block.roll(1, 0), step, root.rows.T, root.weights


def _descend(rows: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Return what :func:`column_rounding.descend` takes."""
    block, step, moments = _problem(rows, seed)
    root = gptq.root(moments)
    start, best = column_rounding.feed_back(block, torch.zeros_like(block), step, root.rows.T, root.weights)
    step = torch.cat([step, step.gather(0, best.unsqueeze(0))])
    slope = (start - block) @ moments + 0.1 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return start, slope, step, moments, torch.linalg.inv(moments), root.rows.T


def _assert_same_bits(found: column_rounding.Chosen, wanted: column_rounding.Chosen) -> None:
    assert torch.equal(found[0].view(torch.int32), wanted[0].view(torch.int32))
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(("rows", "seed"), [(6, 0), (128, 1), (300, 2), (4096, 3)])
def test_feedback_inside_a_block_has_the_same_bits(rows: int, seed: int) -> None:
    given = _feed_back(rows, seed)
    found = column_rounding.feed_back(*given)
    assert found[0].count_nonzero() > 6 * rows
    assert len(found[1].unique()) > 1
    _assert_same_bits(found, column_rounding.feed_back_in_torch(*given))


@pytest.mark.parametrize(("rows", "seed"), [(6, 0), (128, 1), (300, 2), (4096, 3)])
def test_descent_inside_a_block_has_the_same_bits(rows: int, seed: int) -> None:
    given = _descend(rows, seed)
    found = column_rounding.descend(*given, 2)
    assert not torch.equal(found[0], given[0])
    assert (found[1] == 6).any()  # rows that nothing makes better
    assert (found[1] < 6).any()
    _assert_same_bits(found, column_rounding.descend_in_torch(*given, 2))


@pytest.mark.slow
def test_each_of_its_functions_is_one_kernel_with_the_same_bits() -> None:
    """As on a GPU, but by the compiler for the CPU."""
    from torch._inductor import metrics

    torch._dynamo.reset()
    column_rounding.fused.cache_clear()
    metrics.reset()
    feed_back, descend = _feed_back(300, 4), _descend(300, 4)
    found = column_rounding.feed_back_in_torch(*feed_back, column_rounding.fused)
    _assert_same_bits(found, column_rounding.feed_back(*feed_back))
    found = column_rounding.descend_in_torch(*descend, 1, column_rounding.fused)
    _assert_same_bits(found, column_rounding.descend(*descend, 1))
    assert metrics.generated_kernel_count <= len(column_rounding.FUSED) + 2  # of two shapes


def test_a_view_of_a_wider_weight_is_rounded_as_its_copy() -> None:
    block, carried, step, onto, weights = _feed_back(64, 4)
    wide = torch.cat([block, block + 1], dim=1)
    found = column_rounding.feed_back(wide[:, :16], carried, step, onto, weights)
    _assert_same_bits(found, column_rounding.feed_back(block, carried, step, onto, weights))
