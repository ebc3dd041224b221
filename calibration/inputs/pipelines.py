"""What diffusers' pipelines are called with beside a prompt: an entry for each class. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["PIPELINES", "Pipeline"]

_UNDECODED: Final[Mapping[str, Any]] = {"output_type": "latent"}


@dataclass(frozen=True)
class Pipeline:
    """A class of pipelines, as prompts are sampled with it.

    Attributes:
        pictures: arguments that take a picture each, ``mask_image`` the mask of one.
        optional: whether it draws without a picture as well.
        mode: of the pictures, as Pillow names it.
        side: pixels of a picture's shorter side, at least.
        resolution: arguments that take the pixels of a side of what is drawn.
        multiple: of such a side; 1 where the pipeline rounds by itself.
        resolutions: the only sides that it draws; none where it draws any.
        frames: the argument that takes their number; None where it draws pictures.
        guidance: arguments that take the scale of its guidance; none where a scale alone changes nothing.
        settings: further arguments; by default latents are not decoded.
        blocks: class of the blocks of a modular pipeline; None of others.
        needs: package that the class fails without, where transformers or diffusers do not bring it.
        flux1: whether it is one of FLUX.1's, with which ``compare`` draws.
    """

    pictures: tuple[str, ...] = ()
    optional: bool = False
    mode: str = "RGB"
    side: int = 1
    resolution: tuple[str, ...] = ("height", "width")
    multiple: int = 1
    resolutions: tuple[int, ...] = ()
    frames: str | None = None
    guidance: tuple[str, ...] = ("guidance_scale",)
    settings: Mapping[str, Any] = field(default_factory=lambda: _UNDECODED)
    blocks: str | None = None
    needs: str | None = None
    flux1: bool = False


_FLUX2: Final = Pipeline(pictures=("image",), optional=True, side=64)
_QWEN: Final = Pipeline(guidance=())  # its guidance takes a negative prompt, of which it has none by itself
_EDIT: Final = Pipeline(pictures=("image",), guidance=())

PIPELINES: Final[Mapping[str, Pipeline]] = {
    "FluxPipeline": Pipeline(flux1=True),
    "FluxKontextPipeline": Pipeline(pictures=("image",), flux1=True),
    "FluxFillPipeline": Pipeline(pictures=("image", "mask_image"), flux1=True),
    "FluxControlPipeline": Pipeline(pictures=("control_image",), flux1=True),
    "FluxImg2ImgPipeline": Pipeline(pictures=("image",), flux1=True),
    "FluxInpaintPipeline": Pipeline(pictures=("image", "mask_image"), flux1=True),
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": _FLUX2,
    "Flux3ModularPipeline": Pipeline(multiple=16, guidance=(), settings={}, blocks="Flux3AutoBlocks"),
    "Flux3DistilledModularPipeline": Pipeline(multiple=16, guidance=(), settings={}, blocks="Flux3DistilledAutoBlocks"),
    "QwenImagePipeline": _QWEN,
    "QwenImageEditPipeline": _EDIT,
    "QwenImageEditPlusPipeline": _EDIT,
    # Of latents alone diffusers 0.42 makes no result here, so the layers are decoded.
    "QwenImageLayeredPipeline": Pipeline(
        pictures=("image",),
        mode="RGBA",
        resolution=("resolution",),
        resolutions=(640, 1024),
        guidance=(),
        settings={"output_type": "pt"},
    ),
    "ZImagePipeline": Pipeline(multiple=16),
    "Krea2Pipeline": Pipeline(),
    "StableDiffusion3Pipeline": Pipeline(multiple=16),
    "ChromaPipeline": Pipeline(),
    "WanPipeline": Pipeline(multiple=16, frames="num_frames"),
    "WanImageToVideoPipeline": Pipeline(pictures=("image",), multiple=16, frames="num_frames", needs="ftfy"),
    # Without the guidance by skipped blocks and by one of video and sound alone, which are other graphs.
    "LTX2Pipeline": Pipeline(
        multiple=32,
        frames="num_frames",
        guidance=("guidance_scale", "audio_guidance_scale"),
        settings={
            **_UNDECODED,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_modality_scale": 1.0,
        },
    ),
}
"""Class of a pipeline, as its index names it, to how it is called."""
