"""Choose NVFP4 codes and block scales that keep a linear's output, not its weight: GPTQ, then coordinate descent.

Both minimize ``trace((Q - W) H (Q - W)^T)`` over what NVFP4 can store, H being the second moments of the input.

1. :func:`round_with_feedback` goes through the columns; what rounding one of them costs is given to those that
   follow (Frantar et al., "GPTQ", 2022). The scale of a block is chosen inside this loop: every candidate rounds the
   block with feedback, and the one that costs least is kept.
2. :func:`descend` goes back through the blocks and chooses scale and codes of each anew, given all the others, as long
   as that helps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import torch

from calibration.formats import nvfp4
from calibration.methods.quality import column_rounding

__all__ = ["Root", "Rounded", "descend", "error", "plain", "root", "round_with_feedback"]

_SIZE: Final = nvfp4.BLOCK_SIZE

_FEEDBACK_STEPS: Final = range(-2, 7)
"""Scales that are tried, in steps of E4M3 (about 9 % each) from the one that holds the block's largest weight."""

_DESCENT_STEPS: Final = range(-1, 2)
"""The same, from the one that a block has."""

_LARGEST: Final = 126
"""The bits of 448, E4M3's largest number; 0 would be a block of zeros."""

_INNER_SWEEPS: Final = 1
"""Through the columns of one block, for every scale that is tried."""

_PANEL: Final = 256
"""Columns whose errors reach the others in one product; of fewer, moments beyond the cache are read too slowly."""

_STORED: Final = 32
"""Rows that are packed at a time, so that what is computed of them stays in the cache."""

_PROBES: Final = 8
"""Random vectors by which a triangle is held to the moments that it should give."""

_CHANGED: Final = 1e-2
"""What may be changed, relative to the least of the diagonal, which is the damping at least: that may be 1 % off."""


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
        packed = torch.empty(len(s8), self.values.shape[1] // 2, dtype=torch.uint8, device=s8.device)
        rows = _STORED if packed.is_cpu else len(packed)
        for values, scales, into in zip(*(each.split(rows) for each in (self.values, s8, packed)), strict=True):
            step = (scales.float() * scale).unsqueeze(-1)
            codes = nvfp4.codes_under(values.unflatten(-1, (-1, _SIZE)), step).flatten(-2)
            assert torch.equal(nvfp4.dequantize(codes, scales, scale), values), "codes do not give the values"
            into.copy_(nvfp4.pack_codes(codes))
        return packed, s8


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


@dataclass(frozen=True)
class Root:
    """Second moments as ``R diag(weights)^2 R^T``, which says what an error costs when those behind it make up for it.

    Attributes:
        rows: R, upper triangle with ones on its diagonal, FP32 [..., K, K].
        weights: FP32 [..., K].
    """

    rows: torch.Tensor
    weights: torch.Tensor

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """Return ``right`` times the inverse of the moments, FP32 [N, K]."""
        triangle = {"left": False, "unitriangular": True}
        half = torch.linalg.solve_triangular(self.rows.mT, right, upper=False, **triangle)
        return torch.linalg.solve_triangular(self.rows, half.div_(self.weights.square()), upper=True, **triangle)


def root(moments: torch.Tensor) -> Root:
    """Return the root of second moments, computed in FP32, or in FP64 where FP32 would change them too much.

    Args:
        moments: positive definite, FP32 [..., K, K]. Two more such matrices are held meanwhile, in FP64 four.
    """
    lower, failed = torch.linalg.cholesky_ex(_turned(moments))
    if failed.any() or not _gives(lower, moments):
        lower = torch.linalg.cholesky(_turned(moments).double()).to(moments.dtype)
    upper = _turned(lower)
    weights = upper.diagonal(dim1=-2, dim2=-1).clone()
    return Root(upper.div_(weights.unsqueeze(-2)), weights)


def _turned(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix with its rows and columns in reverse, which makes an upper triangle of a lower one."""
    return matrix.flip(-2, -1)


def _gives(lower: torch.Tensor, moments: torch.Tensor) -> bool:
    """Whether a triangle gives the moments back, reversed, but for a small part of their least diagonal."""
    probe = torch.randn(moments.shape[-1], _PROBES, generator=torch.Generator().manual_seed(0)).to(moments.device)
    changed = lower @ (lower.mT @ probe) - (moments @ probe.flip(0)).flip(-2)
    least = moments.diagonal(dim1=-2, dim2=-1).amin(dim=-1)
    return bool((changed.norm(dim=(-2, -1)) <= _CHANGED * least * probe.norm()).all())


def round_with_feedback(weight: torch.Tensor, root: Root, scale: torch.Tensor) -> Rounded:
    """Round a weight column by column, giving each column's error to those that follow.

    Args:
        weight: FP32 [N, K], K a multiple of 16.
        root: of the moments.
        scale: the FP32 global scale, 0-d.
    """
    error = torch.zeros_like(weight)
    values = torch.empty_like(weight)
    scales = weight.new_empty((len(weight), weight.shape[1] // _SIZE), dtype=torch.long)
    for panel in _panels(weight):
        own = weight[:, panel].contiguous()
        found, missed = torch.empty_like(own), torch.empty_like(own)
        carried = error[:, : panel.start] @ root.rows[: panel.start, panel]
        for inside, place in _blocks(panel):
            block, more = own[:, inside], carried[:, inside]
            usual = nvfp4.block_scales((block + more).abs().amax(dim=1), scale).view(torch.uint8).long()
            tried = _candidates(usual, _FEEDBACK_STEPS)
            onto, weights = root.rows[place, place].T, root.weights[place]
            found[:, inside], best = column_rounding.feed_back(block, more, _step(tried, scale), onto, weights)
            scales[:, place.start // _SIZE] = tried.gather(0, best.unsqueeze(0)).squeeze(0)
            torch.sub(block, found[:, inside], out=missed[:, inside])
            carried[:, inside.stop :].addmm_(missed[:, inside], root.rows[place, place.stop : panel.stop])
        values[:, panel], error[:, panel] = found, missed
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
    values, scales = start.values.clone(), start.scales.clone()
    error = values - weight
    own = torch.stack([moments[i : i + _SIZE, i : i + _SIZE] for i in range(0, weight.shape[1], _SIZE)])
    inverse, onto = torch.linalg.inv(own.double()).to(own.dtype), root(own).rows.mT
    for _ in range(sweeps):
        changed = False
        for panel in _panels(weight):
            held, change = values[:, panel].contiguous(), torch.zeros_like(values[:, panel])
            slope = error @ moments[:, panel]
            for inside, place in _blocks(panel):
                block = place.start // _SIZE
                usual = scales[:, block]
                as_it_is = usual.unsqueeze(0)
                tried = torch.cat([_candidates(usual, _DESCENT_STEPS), as_it_is, as_it_is])
                around = own[block], inverse[block], onto[block]
                given = held[:, inside], slope[:, inside], _step(tried[:-1], scale), *around, _INNER_SWEEPS
                found, best = column_rounding.descend(*given)
                torch.sub(found, held[:, inside], out=change[:, inside])
                slope[:, inside.stop :].addmm_(change[:, inside], moments[place, place.stop : panel.stop])
                held[:, inside], scales[:, block] = found, tried.gather(0, best.unsqueeze(0)).squeeze(0)
            values[:, panel] = held
            error[:, panel] += change
            changed = changed or bool(change.any())
        if not changed:
            break
    return Rounded(values, scales)


def _panels(weight: torch.Tensor) -> Iterator[slice]:
    """Yield the columns of each panel, some blocks wide; what belongs to one lies together while it is worked on."""
    for begin in range(0, weight.shape[1], _PANEL):
        yield slice(begin, min(begin + _PANEL, weight.shape[1]))


def _blocks(panel: slice) -> Iterator[tuple[slice, slice]]:
    """Yield the columns of each block of a panel: counted in the panel, and in the weight."""
    for begin in range(0, panel.stop - panel.start, _SIZE):
        yield slice(begin, begin + _SIZE), slice(panel.start + begin, panel.start + begin + _SIZE)


def _candidates(usual: torch.Tensor, steps: Iterable[int]) -> torch.Tensor:
    """Return the bits of scales around those of every row [N]: [C, N]."""
    return torch.stack([(usual + step).clamp(1, _LARGEST) for step in steps])


def _step(bits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what one is worth under block scales of these bits: FP32, of their shape."""
    return bits.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale
