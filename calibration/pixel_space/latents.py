"""Images to latents and back: pixel_unshuffle stands in for the VAE, then FLUX's own 2x2 packing."""

from __future__ import annotations

import torch
from torch.nn import functional

from calibration.pixel_space.description import PATCH

__all__ = ["decode", "encode"]


def encode(images: torch.Tensor) -> torch.Tensor:
    """Turn images [B, C, H, W] in [0, 1] into packed latents [B, HW/16, 16C] in [-1, 1]; H, W multiples of 4."""
    batch, _, height, width = images.shape
    latents = functional.pixel_unshuffle(images * 2 - 1, 2)
    blocks = latents.view(batch, -1, height // PATCH, 2, width // PATCH, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def decode(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Turn packed latents [B, HW/16, 16C] into FP32 images [B, C, H, W], clamped to [0, 1]."""
    blocks = latents.float().view(len(latents), height // PATCH, width // PATCH, -1, 2, 2)
    unpacked = blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return ((functional.pixel_shuffle(unpacked, 2) + 1) / 2).clamp(0, 1)
