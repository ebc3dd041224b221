"""Choose NVFP4 codes and block scales that keep a linear's output, not its weight: GPTQ, then coordinate descent.

Both minimize ``trace((Q - W) H (Q - W)^T)`` over what NVFP4 can store, H being the second moments of the input.

1. :func:`round_with_feedback` goes through the columns; what rounding one of them costs is given to those that
   follow (Frantar et al., "GPTQ", 2022). The scale of a block is chosen inside this loop: every candidate rounds the
   block with feedback, and the one that costs least is kept.
2. :func:`descend` goes back through the blocks and chooses scale and codes of each anew, given all the others, as long
   as that helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from calibration.formats import nvfp4
from calibration.methods.quality import column_rounding

__all__ = ["Rounded", "descend", "error", "inverse_root", "plain", "round_with_feedback"]

_FEEDBACK_STEPS: Final = range(-6, 2)
"""Scales that are tried, in steps of E4M3 (about 9 % each) from the one that holds the block's largest weight."""

_FOUR_OVER_SIX_STEPS: Final = range(-2, 7)
"""The same where the largest weight may also become a 4, five steps up. Of .2 % of the blocks a lower one is best."""

_DESCENT_STEPS: Final = range(-3, 4)
"""The same, from the one that a block has."""

_LARGEST: Final = 126
"""The bits of 448, E4M3's largest number; 0 would be a block of zeros."""

_INNER_SWEEPS: Final = 2
"""Through the columns of one block, for every scale that is tried."""


@dataclass(frozen=True)
class Rounded:
    """A weight in NVFP4.

    Attributes:
        values: dequantized, FP32 [N, K].
        scales: bits of the block scales, E4M3, int64 [N, K / 16].
    """

    values: torch.Tensor
    scales: torch.Tensor

    def stored(self, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return packed codes, uint8 [N, K / 2], and block scales, float8_e4m3fn [N, K / 16].

        Args:
            scale: the FP32 global scale under which the weight was rounded, 0-d.
        """
        s8 = self.scales.to(torch.uint8).view(torch.float8_e4m3fn)
        step = (s8.float() * scale).unsqueeze(-1)
        codes = nvfp4.codes_under(self.values.unflatten(-1, (-1, nvfp4.BLOCK_SIZE)), step).flatten(-2)
        assert torch.equal(nvfp4.dequantize(codes, s8, scale), self.values), "codes do not give the values"
        return nvfp4.pack_codes(codes), s8


def plain(weight: torch.Tensor, scale: torch.Tensor) -> Rounded:
    """Return a weight rounded to nearest: what GPTQ is compared with, FP32 [N, K] under a global scale."""
    codes, s8 = nvfp4.quantize(weight, scale)
    return Rounded(nvfp4.dequantize(codes, s8, scale), s8.view(torch.uint8).long())


def error(rounded: torch.Tensor, weight: torch.Tensor, moments: torch.Tensor) -> float:
    """Return the mean squared error of the output, summed over its features.

    Args:
        rounded, weight: FP32 [N, K].
        moments: mean of ``x x^T`` over the inputs, FP32 [K, K].
    """
    difference = rounded - weight
    return float(((difference @ moments) * difference).sum())


def inverse_root(moments: torch.Tensor) -> torch.Tensor:
    """Return the upper triangle U with ``U^T U`` the inverse of ``moments``: what an error costs, and whom it is given.

    Args:
        moments: positive definite, FP32 [..., K, K]. Computed in FP64, which takes 16 K^2 bytes besides.

    Returns:
        FP32 [..., K, K].
    """
    matrix = torch.linalg.cholesky(moments.double())
    matrix = torch.cholesky_inverse(matrix)
    return torch.linalg.cholesky(matrix, upper=True).to(moments.dtype)


def round_with_feedback(
    weight: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor, four_over_six: bool = False
) -> Rounded:
    """Round a weight column by column, giving each column's error to those that follow.

    Args:
        weight: FP32 [N, K], K a multiple of 16.
        feedback: :func:`inverse_root` of the moments, FP32 [K, K].
        scale: the FP32 global scale, 0-d.
        four_over_six: try scales under which a block's largest weight becomes a 4, too, and fewer that clip it.
    """
    weight, size = weight.clone(), nvfp4.BLOCK_SIZE
    steps = _FOUR_OVER_SIX_STEPS if four_over_six else _FEEDBACK_STEPS
    columns, rows = weight.shape[1], torch.arange(len(weight), device=weight.device)
    values, scales = torch.empty_like(weight), weight.new_empty((len(weight), columns // size), dtype=torch.long)
    for begin in range(0, columns, size):
        end = begin + size
        block = weight[:, begin:end]
        usual = nvfp4.block_scales(block.abs().amax(dim=1), scale).view(torch.uint8).long()
        tried = _candidates(usual, steps)
        rounded, errors = column_rounding.feed_back(block, _step(tried, scale), feedback[begin:end, begin:end])
        best = errors.square().sum(dim=-1).argmin(dim=0)
        values[:, begin:end], scales[:, begin // size] = rounded[best, rows], tried[best, rows]
        weight[:, end:].addmm_(errors[best, rows], feedback[begin:end, end:], alpha=-1)
    return Rounded(values, scales)


def descend(weight: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor, start: Rounded, sweeps: int) -> Rounded:
    """Choose every block's scale and codes anew, the others given, so that the error never grows.

    Args:
        weight: FP32 [N, K].
        moments: positive definite, FP32 [K, K].
        scale: the FP32 global scale, 0-d.
        start: the weight, rounded under that scale.
        sweeps: through all blocks, at most; it ends when nothing changes any more.
    """
    size = nvfp4.BLOCK_SIZE
    values, scales = start.values.clone(), start.scales.clone()
    slope = (values - weight) @ moments
    own = torch.stack([moments[i : i + size, i : i + size] for i in range(0, len(moments), size)])
    feedback = inverse_root(own)
    for _ in range(sweeps):
        changed = False
        for block, begin in enumerate(range(0, weight.shape[1], size)):
            inside = slice(begin, begin + size)
            found, tried, better = _best_block(
                values[:, inside], scales[:, block], slope[:, inside], own[block], feedback[block], scale
            )
            if better.any():
                changed = True
                slope.addmm_(found - values[:, inside], moments[inside])
                values[:, inside], scales[:, block] = found, tried
        if not changed:
            break
    return Rounded(values, scales)


def _best_block(
    values: torch.Tensor,
    scales: torch.Tensor,
    slope: torch.Tensor,
    moments: torch.Tensor,
    feedback: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a block's values and scales, changed in the rows where that helps, and which rows these are."""
    rows = torch.arange(len(values), device=values.device)
    wanted = values - torch.linalg.solve(moments, slope, left=False)  # what would cost least, if it could be stored
    tried = _candidates(scales, _DESCENT_STEPS)
    rounded, _ = column_rounding.feed_back(wanted, _step(tried, scale), feedback)
    rounded, tried = torch.cat([rounded, values.unsqueeze(0)]), torch.cat([tried, scales.unsqueeze(0)])
    step = _step(tried, scale)
    gradient = (rounded - wanted) @ moments
    column_rounding.descend(rounded, gradient, step, moments, _INNER_SWEEPS)
    costs = ((rounded - wanted) * gradient).sum(dim=-1)
    best = costs.argmin(dim=0)
    cost = (((values - wanted) @ moments) * (values - wanted)).sum(dim=-1)
    better = costs[best, rows] < cost * (1 - 1e-6)  # less is within what FP32 cannot tell
    found = torch.where(better.unsqueeze(-1), rounded[best, rows], values)
    return found, torch.where(better, tried[best, rows], scales), better


def _candidates(usual: torch.Tensor, steps: Sequence[int] | Iterable[int]) -> torch.Tensor:
    """Return the bits of scales around those of every row [N]: [C, N]."""
    return torch.stack([(usual + step).clamp(1, _LARGEST) for step in steps])


def _step(bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what one is worth under block scales of these bits: FP32, of their shape."""
    return bits.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale
