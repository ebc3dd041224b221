"""Autoencoders as models that are called with tensors alone: here the one that decodes latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.upsampling import Upsample2D
from torch import nn

from calibration.adapters.construction import constructed_as

__all__ = ["KLDecoder"]


class _Upsample(nn.Module):
    """What an Upsample2D becomes: without its copy of a batch of 64, on which torch.export would bound the batch."""

    conv: nn.Module

    def forward(self, hidden_states: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
        """Double the sides of [B, C, H, W]."""
        assert output_size is None
        larger: torch.Tensor = self.conv(nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return larger


@constructed_as(AutoencoderKL)
class KLDecoder(AutoencoderKL):
    """AutoencoderKL's decoder; the encoder's tensors are there, and nothing reads them."""

    decoder: Any
    post_quant_conv: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        upsamplers: list[Any] = [module for module in self.decoder.modules() if type(module) is Upsample2D]
        for module in upsamplers:
            module.__class__ = _Upsample

    @classmethod
    def tensors_of(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return name to shape of every tensor of a config's checkpoint."""
        with torch.device("meta"):
            model: nn.Module = cls.from_config(config)  # type: ignore[no-untyped-call]
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def forward(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Decode latents.

        Args:
            latents: [B, latent_channels, H, W], scaled and shifted back as pipelines do it before they decode.
            return_dict: for the call of diffusers' models; a tuple is returned all the same.

        Returns:
            Pictures from -1 to 1, [B, out_channels, 8 H, 8 W].
        """
        del return_dict
        return (self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents)),)
