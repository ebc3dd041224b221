"""Images to latents and back: pixel_unshuffle stands in for the VAE, then FLUX's own 2x2 packing."""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["CHANNELS", "IMAGE_SIZE", "TOKENS", "decode", "encode", "image_ids", "text_ids"]

IMAGE_SIZE = 16
CHANNELS = 16
TOKENS = (IMAGE_SIZE // 4) ** 2


def encode(images: torch.Tensor) -> torch.Tensor:
    """Turn images [B, H, W] in [0, 1] into packed latents [B, HW/16, 16] in [-1, 1]; H, W multiples of 4."""
    batch, height, width = images.shape
    latents = functional.pixel_unshuffle(images.unsqueeze(1) * 2 - 1, 2)
    blocks = latents.view(batch, 4, height // 4, 2, width // 4, 2)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 4) * (width // 4), CHANNELS)


def decode(latents: torch.Tensor, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> torch.Tensor:
    """Turn packed latents [B, HW/16, 16] into FP32 images [B, H, W], clamped to [0, 1]."""
    blocks = latents.float().view(-1, height // 4, width // 4, 4, 2, 2)
    unpacked = blocks.permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, height // 2, width // 2)
    return ((functional.pixel_shuffle(unpacked, 2).squeeze(1) + 1) / 2).clamp(0, 1)


def image_ids(height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> torch.Tensor:
    """Return the positions of the image tokens, FP32 [HW/16, 3]: (0, row, column), as FLUX has them."""
    rows, columns = torch.meshgrid(torch.arange(height // 4), torch.arange(width // 4), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def text_ids(tokens: int) -> torch.Tensor:
    """Return the positions of the text tokens, FP32 [tokens, 3]: all zero, as FLUX has them."""
    return torch.zeros(tokens, 3)
