"""Images of FLUX.1 from prompts that are encoded once: the text encoders first, then one transformer, then the VAE.

The parts are those of ``FluxPipeline``, and an image has the bytes that the whole pipeline gives for the prompt, the
seed and the settings: the noise is drawn on the CPU.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from protocol.album import Album, saved
from protocol.prompts import Asked
from safetensors.torch import load_file, save_file

from calibration.inputs.prompts import drawing
from fp4trt.progress import PATIENCE_S, note, tracking

LATENTS = "latents"
_WARM = 2
"""Images of a model after which its pace is reported; the first takes longer."""


@dataclass(frozen=True)
class Settings:
    """How an image is drawn.

    Attributes:
        steps: of the schedule.
        guidance: the guidance scale that the transformer reads.
        resolution: pixels of a side.
        text_tokens: length to which T5's input is padded or cut.
    """

    steps: int
    guidance: float
    resolution: int
    text_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return them as JSON."""
        return asdict(self)


@dataclass
class Pace:
    """How long the images of a run take, and therefore what is left of it.

    Attributes:
        missing: label to images that are not there yet.
        seconds: label to what each image of it took, in this run.
    """

    missing: dict[str, int]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def drew(self, label: str, seconds: float) -> str:
        """Count an image; return what is left of the run."""
        taken = self.seconds.setdefault(label, [])
        taken.append(seconds)
        self.missing[label] -= 1
        left = self.left()
        if len(taken) == _WARM:
            images = sum(self.missing.values())
            note(f"{label}: {taken[-1]:.1f} s an image; left of all models: {images}, about {duration(left)}")
        return f"all: {duration(left)}"

    def left(self) -> float:
        """Return seconds until all images are there: a model that has not begun is taken to be as fast as the last."""
        paces = {label: _usual(taken) for label, taken in self.seconds.items()}
        last = next(reversed(paces.values()), 0.0)
        return sum(count * paces.get(label, last) for label, count in self.missing.items())


def _usual(seconds: Sequence[float]) -> float:
    """Return the mean without the first, which is of a cold machine, where there are others."""
    later = seconds[1:] or seconds
    return sum(later) / len(later)


def duration(seconds: float) -> str:
    """Return a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


@dataclass(frozen=True)
class Texts:
    """The encoded prompts, a file each."""

    folder: Path
    tokens: int

    def of(self, asked: Asked) -> dict[str, torch.Tensor]:
        """Return what the pipeline takes in place of a prompt."""
        return load_file(self._file(asked))

    def encode(self, root: Path, asked: Sequence[Asked], device: str) -> None:
        """Encode the prompts that are not there yet, one at a time, and let the encoders go."""
        missing = {one.text_hash: one for one in asked if not self._file(one).is_file()}
        if not missing:
            return
        pipeline = _pipeline(root, transformer=None, vae=None).to(device)
        with tracking(len(missing), "encoding prompts", PATIENCE_S) as advance, torch.inference_mode(), drawing(root):
            for one in missing.values():
                embeds, pooled, _ = pipeline.encode_prompt(
                    prompt=one.prompt, prompt_2=None, device=device, max_sequence_length=self.tokens
                )
                tensors = {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu()}
                saved(self._file(one), functools.partial(save_file, tensors))
                advance()
        del pipeline
        _release(device)

    def _file(self, asked: Asked) -> Path:
        return self.folder / f"{asked.text_hash}-{self.tokens}.safetensors"


def _pipeline(root: Path, **parts: Any) -> Any:
    """Return the BF16 pipeline in a folder with some parts given, or None to leave them out, without a bar."""
    from diffusers import FluxPipeline

    load: Any = FluxPipeline.from_pretrained
    with drawing(root):
        pipeline = load(root, torch_dtype=torch.bfloat16, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Decoder:
    """Makes pictures of packed latents, as ``FluxPipeline`` does; takes the VAE out of one.

    Args:
        pipeline: has a VAE, and has none afterwards: what is left of it is moved, and asked where it computes.
        side: of the pictures, in pixels.
        device: where.
    """

    def __init__(self, pipeline: Any, side: int, device: str) -> None:
        self._vae, self._processor, self._factor = pipeline.vae, pipeline.image_processor, pipeline.vae_scale_factor
        self._side, self._device = side, device
        pipeline.register_modules(vae=None)

    def __call__(self, album: Album, asked: Asked, latents: torch.Tensor) -> None:
        """Put the picture of latents [1, tokens, channels] into an album."""
        from diffusers import FluxPipeline

        vae = self._vae.to(self._device)
        with torch.inference_mode():
            unpacked = FluxPipeline._unpack_latents(latents.to(self._device), self._side, self._side, self._factor)
            unpacked = (unpacked / vae.config.scaling_factor) + vae.config.shift_factor
            picture = self._processor.postprocess(vae.decode(unpacked, return_dict=False)[0], output_type="pil")[0]
        saved(album.picture(asked), functools.partial(picture.save, format="PNG"))


@dataclass(frozen=True)
class Painter:
    """Draws with one transformer after the other.

    Attributes:
        root: the pipeline's folder.
        settings: of all images.
        texts: the encoded prompts.
        device: where.
        offload: decode only when all of a model's latents are there and its transformer is gone.
    """

    root: Path
    settings: Settings
    texts: Texts
    device: str
    offload: bool

    def draw(self, album: Album, asked: Sequence[Asked], load: Callable[[], Any], pace: Pace) -> None:
        """Draw what an album misses.

        Args:
            album: where the images go.
            asked: all that it is to hold.
            load: returns the transformer, in BF16 on the CPU.
            pace: called for each image.
        """
        missing = album.missing(asked)
        if not missing:
            return
        noisy = [one for one in missing if not album.latents(one).is_file()]
        pace.missing[album.label] = len(noisy)
        without = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipeline = _pipeline(self.root, transformer=load() if noisy else None, **without)
        decode = Decoder(pipeline, self.settings.resolution, self.device)
        if noisy:
            self._denoise(pipeline, None if self.offload else decode, album, noisy, pace)
        del pipeline
        _release(self.device)
        waiting = [one for one in missing if album.latents(one).is_file()]
        with tracking(len(waiting), f"decoding {album.label}", PATIENCE_S) as advance:
            for one in waiting:
                decode(album, one, load_file(album.latents(one))[LATENTS])
                album.latents(one).unlink()
                advance()
        del decode
        _release(self.device)

    def _denoise(self, pipeline: Any, decode: Decoder | None, album: Album, noisy: Sequence[Asked], pace: Pace) -> None:
        """Draw images; their latents alone without a decoder."""
        pipeline.to(self.device)
        with tracking(len(noisy), f"drawing {album.label}", PATIENCE_S) as advance:
            for one in noisy:
                begun = time.monotonic()
                latents = self._latents(pipeline, one)
                if decode is None:
                    saved(album.latents(one), functools.partial(save_file, {LATENTS: latents.cpu()}))
                else:
                    decode(album, one, latents)
                advance(detail=pace.drew(album.label, time.monotonic() - begun))

    def _latents(self, pipeline: Any, asked: Asked) -> torch.Tensor:
        texts = {name: value.to(self.device) for name, value in self.texts.of(asked).items()}
        side = self.settings.resolution
        with drawing(self.root):
            found: torch.Tensor = pipeline(
                **texts,
                num_inference_steps=self.settings.steps,
                guidance_scale=self.settings.guidance,
                height=side,
                width=side,
                generator=torch.Generator().manual_seed(asked.seed),
                output_type="latent",
            ).images
        return found


def _release(device: str) -> None:
    """Give back the memory of what was let go."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def space_for(images: int, prompts: int, settings: Settings, width: int) -> int:
    """Return about how many bytes of disk drawing needs: two thirds of raw pixels for PNG, and the encoded prompts.

    Args:
        images: to draw.
        prompts: to encode.
        settings: of the images.
        width: of what T5 makes of a token.
    """
    return images * settings.resolution**2 * 2 + prompts * settings.text_tokens * width * 2
