"""The compiled inner loops of GPTQ and descent give the bits of those in torch."""

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


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.int32), right.view(torch.int32))


@pytest.mark.parametrize(("rows", "seed"), [(6, 0), (128, 1), (300, 2), (4096, 3)])
def test_feedback_inside_a_block_has_the_same_bits(rows: int, seed: int) -> None:
    block, step, moments = _problem(rows, seed)
    feedback = gptq.inverse_root(moments)
    ours = column_rounding.feed_back(block, step, feedback)
    reference = column_rounding.feed_back_reference(block, step, feedback)
    assert ours[0].count_nonzero() > 30 * rows
    for found, wanted in zip(ours, reference, strict=True):
        assert _same_bits(found, wanted)


@pytest.mark.parametrize(("rows", "seed"), [(6, 0), (128, 1), (300, 2), (4096, 3)])
def test_descent_inside_a_block_has_the_same_bits(rows: int, seed: int) -> None:
    block, step, moments = _problem(rows, seed)
    start, _ = column_rounding.feed_back_reference(block, step, gptq.inverse_root(moments))
    gradient = (start - block) @ moments
    ours, reference = (start.clone(), gradient.clone()), (start.clone(), gradient.clone())
    column_rounding.descend(*ours, step, moments, 2)
    column_rounding.descend_reference(*reference, step, moments, 2)
    assert not torch.equal(ours[0], start)
    for found, wanted in zip(ours, reference, strict=True):
        assert _same_bits(found, wanted)


def test_a_view_of_a_wider_weight_is_rounded_as_its_copy() -> None:
    block, step, moments = _problem(64, 4)
    wide = torch.cat([block, block + 1], dim=1)
    feedback = torch.block_diag(gptq.inverse_root(moments), torch.eye(16))
    found = column_rounding.feed_back(wide[:, :16], step, feedback[:16, :16])
    for one, other in zip(found, column_rounding.feed_back(block, step, gptq.inverse_root(moments)), strict=True):
        assert _same_bits(one, other)
