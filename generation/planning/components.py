"""What runs beside the transformer: text encoders and the VAE of a published pipeline, or of a pipeline's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

__all__ = ["Component", "Decoder", "Stage", "decoder_of"]

Stage = Literal["encode", "denoise", "decode"]
"""When a component runs: before the denoising steps, in them, or after them."""

_CHANNELS: Final = 256
"""Channels of the largest feature map of AutoencoderKL, which stands for a VAE that is not known."""

_LTX_PER_PIXEL: Final = 8.5
"""Elements of the largest feature map of AutoencoderKLLTX2Video for each pixel of each frame (traced on meta)."""


@dataclass(frozen=True)
class Decoder:
    """How large the feature maps of a VAE's decoder become.

    Attributes:
        per_pixel: elements of the largest one for each pixel of a frame.
        frames: how many frames of a video it decodes at a time; None for all of them.
        known: whether its class is; else another class stands for it.
    """

    per_pixel: float
    frames: int | None = 1
    known: bool = True

    def elements(self, pixels: int, frames: int) -> int:
        """Return the elements of the largest feature map.

        Args:
            pixels: of a frame.
            frames: of the video, or 1.
        """
        return int(self.per_pixel * pixels * (frames if self.frames is None else min(frames, self.frames)))


@dataclass(frozen=True)
class Component:
    """A model of the pipeline beside the transformer.

    Attributes:
        name: for people.
        stage: when it runs.
        elements: floating-point weights, which are loaded in 16 bit; None where nobody knows.
        stored_bytes: of weights in other types, which stay as they are stored.
        kept_in_fp32: of the elements, those that stay in FP32 in a pipeline in FP16: a T5's ``wo``
            (``_keep_in_fp32_modules`` of transformers).
        decoder: of a VAE.
    """

    name: str
    stage: Stage
    elements: int | None
    stored_bytes: int = 0
    kept_in_fp32: int = 0
    decoder: Decoder | None = None

    def nbytes(self, fp16: bool = False) -> int | None:
        """Return the bytes of its weights on the GPU, None where nobody knows.

        Args:
            fp16: whether the pipeline is in FP16, in which a VAE is FP32, as its maps overflow.
        """
        if self.elements is None:
            return None
        if fp16 and self.decoder is not None:
            return 4 * self.elements + self.stored_bytes
        return 2 * (self.elements + (self.kept_in_fp32 if fp16 else 0)) + self.stored_bytes


def decoder_of(config: Mapping[str, Any]) -> Decoder:
    """Return how large the maps of a VAE become, by its diffusers config.

    Each was traced on the meta device. The largest map is the input of the last level but one, upsampled to the size of
    the picture.
    """
    kind = config.get("_class_name")
    if kind in ("AutoencoderKL", "AutoencoderKLFlux2"):
        return Decoder(_second(config.get("block_out_channels")) or _CHANNELS)
    if kind in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):
        base = _whole(config.get("decoder_base_dim")) or _whole(config.get("base_dim")) or 96
        patch = _whole(config.get("patch_size")) or 1
        channels = base * (_second(config.get("dim_mult")) or 2) / patch**2
        return Decoder(channels, 4 if kind == "AutoencoderKLWan" else 1)
    if kind == "AutoencoderKLLTX2Video":
        return Decoder(_LTX_PER_PIXEL, None)
    return Decoder(_CHANNELS, known=False)


def _second(values: Any) -> int | None:
    """Return the second of some numbers, or the only one."""
    if not isinstance(values, list | tuple) or not values:
        return None
    return _whole(values[min(1, len(values) - 1)])


def _whole(value: Any) -> int | None:
    """Return a whole number above 0, None for anything else."""
    return value if type(value) is int and value > 0 else None
