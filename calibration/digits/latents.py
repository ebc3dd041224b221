"""The built-in model's images to latents and back, and the positions of its tokens."""

from __future__ import annotations

import torch

from calibration.digits.description import DESCRIPTION
from calibration.pixel_space import latents as packing

__all__ = ["CHANNELS", "IMAGE_SIZE", "TOKENS", "decode", "encode", "image_ids", "text_ids"]

IMAGE_SIZE = DESCRIPTION.image.size
CHANNELS = DESCRIPTION.image.token_channels
TOKENS = DESCRIPTION.image.tokens


def encode(images: torch.Tensor) -> torch.Tensor:
    """Turn images [B, H, W] in [0, 1] into packed latents [B, HW/16, 16] in [-1, 1]; H, W multiples of 4."""
    return packing.encode(images.unsqueeze(1))


def decode(latents: torch.Tensor, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> torch.Tensor:
    """Turn packed latents [B, HW/16, 16] into FP32 images [B, H, W], clamped to [0, 1]."""
    return packing.decode(latents, height, width).squeeze(1)


def image_ids(height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> torch.Tensor:
    """Return the positions of the image tokens, FP32 [HW/16, 3]: (0, row, column), as FLUX has them."""
    rows, columns = torch.meshgrid(torch.arange(height // 4), torch.arange(width // 4), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def text_ids(tokens: int) -> torch.Tensor:
    """Return the positions of the text tokens, FP32 [tokens, 3]: all zero, as FLUX has them."""
    return torch.zeros(tokens, 3)
