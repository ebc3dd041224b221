"""Rotary embeddings in real numbers: ONNX has no complex ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["Rotation", "angles", "rotated"]

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine, FP32 [tokens, head / 2], of a batch each or of all alike."""


def angles(positions: torch.Tensor, sizes: Sequence[int], theta: float) -> torch.Tensor:
    """Return the angles of tokens, [tokens, sum(sizes) / 2], in the precision of the positions.

    Args:
        positions: FP32 or FP64 [tokens, axes].
        sizes: of the part of a head that each axis turns.
        theta: base of the frequencies.
    """
    found = []
    for axis, size in enumerate(sizes):
        steps = torch.arange(0, size, 2, device=positions.device).to(positions.dtype).div(size)
        found.append(positions[:, axis, None] * (1.0 / torch.pow(theta, steps)))
    return torch.cat(found, dim=1)


def rotated(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return heads [batch, tokens, heads, head] with each pair of neighbours turned."""
    cosine, sine = (part.unsqueeze(-2) for part in rotation)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    return turned.flatten(-2).to(x.dtype)
