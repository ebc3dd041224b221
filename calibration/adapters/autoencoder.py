"""Autoencoders as models that are called with tensors alone: here the one that decodes latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from diffusers.models.upsampling import Upsample2D
from torch import nn

from calibration.adapters.construction import constructed_as

__all__ = ["KLDecoder", "KLFlux2Decoder"]


class _Upsample(nn.Module):
    """What an Upsample2D becomes: without its copy of a batch of 64, on which torch.export would bound the batch."""

    conv: nn.Module

    def forward(self, hidden_states: torch.Tensor, output_size: int | None = None) -> torch.Tensor:
        """Double the sides of [B, C, H, W]."""
        assert output_size is None
        larger: torch.Tensor = self.conv(nn.functional.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))
        return larger


class _Figures(nn.Module):
    """The running mean and variance of a batch norm, under its names, without the count of training steps."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)


class _Decoder(nn.Module):
    """What decoders have in common; the encoder's tensors are there, and nothing reads them."""

    decoder: Any
    post_quant_conv: Any

    @classmethod
    def tensors_of(cls, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return name to shape of every tensor of a config's checkpoint."""
        made: Any = cls
        with torch.device("meta"):
            model: nn.Module = made.from_config(config)
        return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def _keep_batches_open(self) -> None:
        upsamplers: list[Any] = [module for module in self.decoder.modules() if type(module) is Upsample2D]
        for module in upsamplers:
            module.__class__ = _Upsample

    def forward(self, latents: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Decode latents.

        Args:
            latents: [B, latent_channels, H, W], as pipelines give them to ``decode``: scaled and shifted back.
            return_dict: for the call of diffusers' models; a tuple is returned all the same.

        Returns:
            Pictures from -1 to 1, [B, out_channels, 8 H, 8 W].
        """
        del return_dict
        return (self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents)),)


@constructed_as(AutoencoderKL)
class KLDecoder(_Decoder, AutoencoderKL):
    """AutoencoderKL's decoder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        AutoencoderKL.__init__(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        self._keep_batches_open()


@constructed_as(AutoencoderKLFlux2)
class KLFlux2Decoder(_Decoder, AutoencoderKLFlux2):
    """AutoencoderKLFlux2's decoder; its pipeline undoes the batch norm, whose figures no graph has."""

    bn: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        AutoencoderKLFlux2.__init__(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        self.bn = _Figures(self.bn)
        self._keep_batches_open()
