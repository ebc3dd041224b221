"""``fp4trt generate``: draw with a checkpoint, a graph or an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from calibration.checkpoints.source import find_source
from calibration.inputs.prompts import read_prompts
from fp4trt.errors import BadEnvironment, BadInputs, BadOption
from fp4trt.options import LARGEST_SEED, at_least, file_name, file_names, names, not_negative, one_of, takes
from fp4trt.progress import Progress
from fp4trt.verb import Result, verb
from generation.generate.conditions import called_of, refuse_request
from generation.generate.files import refuse_output, write
from generation.generate.loras import given_loras, with_loras
from generation.generate.metadata import described
from generation.generate.pipeline import DrawingPipeline, find_pipeline
from generation.generate.pixels import description_of, draw_pixels, refuse_of_pipelines
from generation.generate.request import Drawn, Request, size_of
from generation.generate.step_cache import StepCachingOf
from generation.pipelines import Model, PipelineTransformer, model_of
from generation.transformer import open_transformer

__all__ = ["Generated", "generate"]

_RATES: Final = {"WanPipeline": 16.0, "WanImageToVideoPipeline": 16.0, "LTX2Pipeline": 24.0}
"""Frames a second of what a pipeline draws, where its model says nothing else."""


@dataclass(frozen=True, eq=False)
class Generated(Result):
    """What :func:`generate` wrote.

    Attributes:
        images: of each picture or video its ``files`` and what they say of it: ``prompt``, ``seed``, ``steps``,
            ``guidance``, ``size`` and more.
        model: what drew them: ``checkpoint``, ``quantized checkpoint``, ``onnx`` or ``engine``.
        pipeline: class of the pipeline; None of a model without one.
        device: where a checkpoint, and the pipeline's other parts, computed.
        embeddings_from_cache: how many text embeddings were taken from the cache on disk.
        text_encoders_loaded: how often text encoders were loaded.
        calls: of the transformer, and ``calls_left_out`` by step caching.
    """

    images: list[dict[str, Any]]
    model: str
    pipeline: str | None
    device: str
    embeddings_from_cache: int = 0
    text_encoders_loaded: int = 0
    calls: int | None = None
    calls_left_out: int | None = None


@verb
@takes(
    output=file_name,
    prompts=names("a cat"),
    prompts_file=file_name,
    pipeline=file_name,
    transformer_2=file_name,
    count=at_least(1),
    steps=at_least(1),
    guidance=not_negative,
    true_cfg_scale=not_negative,
    negative_prompt=lambda value: None if isinstance(value, str) else "a text",
    image=file_names,
    mask=file_name,
    frames=at_least(1),
    fps=lambda value: not_negative(value) or (None if value else "a number above 0"),
    lora=names("style.safetensors:0.8"),
    teacache=file_name,
    device=one_of("cpu", "cuda"),
)
def generate(
    artifact: str | Path,
    output: str | Path,
    *,
    prompts: str | Sequence[str] = (),
    prompts_file: str | Path | None = None,
    pipeline: str | Path | None = None,
    transformer_2: str | Path | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    count: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    true_cfg_scale: float | None = None,
    image: str | Path | Sequence[str | Path] = (),
    mask: str | Path | None = None,
    resolution: int | str | None = None,
    frames: int | None = None,
    fps: float | None = None,
    lora: str | Sequence[str] = (),
    teacache: str | Path | None = None,
    device: str | None = None,
    low_vram: bool = False,
    embeddings_cache: bool = True,
    force: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Generated:
    """Draw pictures or videos with a model in any of its forms.

    Args:
        artifact: a checkpoint, plain or quantized (``digits`` for the built-in one), a graph, or an engine.
        output: ``NAME.png`` or ``NAME.webp``, of several ``NAME-0.png`` and so on; or a folder.
        prompts: one, or several in a list.
        prompts_file: a text file with more, one a line.
        pipeline: a diffusers pipeline's folder, or its name on the hub, whose transformer is not loaded; by default the
            one that the artifact lies in. A model with a ``sampling.json`` has none.
        transformer_2: the second transformer of a pipeline of two.
        negative_prompt: what not to draw.
        seed: of each prompt's first picture: of ``torch.Generator("cpu").manual_seed(seed)``, as diffusers has it; the
            next one has the next seed.
        count: pictures of each prompt.
        steps, guidance, true_cfg_scale, frames: None leaves them to the pipeline, or steps to ``teacache``.
        image: pictures to edit, to refer to, or to be led by.
        mask: white where to fill; by default what is transparent in the picture, or ``NAME.mask.png`` beside it.
        resolution: pixels of a side, or ``1024x768``.
        fps: frames a second that a video's file says.
        lora: LoRA files, ``FILE`` or ``FILE:STRENGTH``.
        teacache: what ``fp4trt teacache`` wrote for the model, or the folder with it: steps are left out as it says.
        device: ``cpu`` or ``cuda``; by default ``cuda`` where there is one.
        low_vram: have text encoders, transformer and decoding in memory one after the other.
        embeddings_cache: keep text embeddings on disk, and take them from there.
        force: replace files.
        progress: called with each step.

    Raises:
        BadInputs: the model does not draw what is asked for.
        BadOption, BadLora, BadStepCache, BadEnvironment, OutputExists: naming what is wrong.
        UnknownArtifact, BadGraph, BadCheckpoint, UnknownFamily: the artifact is damaged, or says not which model it is.
    """
    model = model_of(_found(artifact))
    caching = None if teacache is None else StepCachingOf(model, Path(teacache), steps, transformer_2 is not None)
    request = Request(
        _prompts(prompts, prompts_file),
        _seed(seed, count),
        count,
        steps if caching is None else caching.steps,
        guidance,
        true_cfg_scale,
        negative_prompt,
        None if resolution is None else size_of(resolution),
        tuple(map(Path, [image] if isinstance(image, str | Path) else image)),
        None if mask is None else Path(mask),
        frames,
    )
    loras = given_loras([lora] if isinstance(lora, str) else list(lora))
    job = _Job(
        model, request, pipeline, transformer_2, _device(device), low_vram, embeddings_cache, loras, fps, caching
    )
    place = Path(output)
    refuse_output(place, len(request.prompts) * count, force)
    images = []
    with job.drawing() as drawn:
        rate = fps or _RATES.get(job.pipeline_class or "", 16.0)
        for index, one in enumerate(drawn):
            said = job.described(one)
            files = write(place, index, len(request.prompts) * count, one, said, rate=rate, force=force)
            images.append({"files": [str(file.resolve()) for file in files], **said})
    encoders = None if job.opened is None else job.opened.encoders
    return Generated(
        images,
        job.model.kind,
        job.pipeline_class,
        job.device,
        0 if encoders is None else encoders.cache.taken,
        0 if encoders is None else encoders.loaded,
        *((None, None) if caching is None else caching.counts()),
    )


@dataclass
class _Job:
    """A request to a model, and what it takes to draw it.

    Attributes:
        pipeline_class: once the pipeline is found.
        opened: once it is open.
    """

    model: Model
    request: Request
    pipeline: str | Path | None
    transformer_2: str | Path | None
    device: str
    low_vram: bool
    on_disk: bool
    loras: Sequence[tuple[Path, float]]
    fps: float | None = None
    caching: StepCachingOf | None = None
    pipeline_class: str | None = None
    opened: DrawingPipeline | None = None
    second: Model | None = None

    @contextlib.contextmanager
    def drawing(self) -> Iterator[Iterator[Drawn]]:
        """Give what is drawn, one after the other; all is held against the model first.

        Raises:
            BadInputs: naming what the model does not draw.
        """
        pixels = description_of(self.model)
        if pixels is not None:
            others = {"--pipeline": self.pipeline, "--transformer-2": self.transformer_2, "--fps": self.fps}
            refuse_of_pipelines(self.model, pixels, self.request, others)
        else:
            root = find_pipeline(self.model, self.pipeline)
            self.pipeline_class, _ = called_of(root, self.model)
            refuse_request(root, self.pipeline_class, self.request, self.transformer_2, self.fps)
        with with_loras(self.model, self.loras) as (path, factors):
            first = PipelineTransformer(
                self.model,
                lambda: open_transformer(path, self.device, factors),
                self._place(self.model),
                None if self.caching is None else self.caching.around,
            )
            try:
                if pixels is not None:
                    yield draw_pixels(pixels, first, self.request)
                else:
                    yield self._by_pipeline(root, first)
            finally:
                first.close()

    def _by_pipeline(self, root: Path, first: PipelineTransformer) -> Iterator[Drawn]:
        assert self.pipeline_class is not None
        transformers = {"transformer": first}
        if self.transformer_2 is not None:
            second = self.transformer_2
            self.second = model_of(_found(second))
            transformers["transformer_2"] = PipelineTransformer(
                self.second, lambda: open_transformer(second, self.device), self._place(self.second)
            )
        self.opened = DrawingPipeline(
            root, self.pipeline_class, transformers, self.device, low_vram=self.low_vram, on_disk=self.on_disk
        )
        return self.opened.draw(self.request)

    def _place(self, model: Model) -> str:
        """Return where a model's inputs are: a graph runs on the CPU."""
        return "cpu" if model.kind == "onnx" else self.device

    def described(self, drawn: Drawn) -> dict[str, Any]:
        """Return the metadata of what was drawn."""
        said = described(
            self.model, self.request, drawn, pipeline=self.pipeline_class, loras=self.loras, second=self.second
        )
        return said if self.caching is None else {**said, "teacache": self.caching.described()}


def _prompts(given: str | Sequence[str], file: str | Path | None) -> tuple[str, ...]:
    """Return all prompts.

    Raises:
        BadInputs: there are none, or one is empty.
    """
    found = [given] if isinstance(given, str) else list(given)
    found += read_prompts(Path(file)) if file is not None else []
    if not found or not all(prompt.strip() for prompt in found):
        what = "an empty prompt" if found else "no prompt"
        raise BadInputs(f"{what} was given; expected some words: -p 'a cat', or --prompts FILE with one prompt a line")
    return tuple(found)


def _seed(seed: Any, count: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED - count + 1:
        raise BadOption(f"seed is {seed!r}; expected a whole number from 0 on, so small that all seeds are below 2^64")
    return seed


def _device(asked: str | None) -> str:
    """Return where to compute.

    Raises:
        BadEnvironment: there is no GPU that was asked for.
    """
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise BadEnvironment("--device cuda was given, but torch finds no NVIDIA GPU here; leave it out, or give cpu")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _found(artifact: str | Path) -> str | Path:
    """Return an artifact as it is, or the folder of one that is named on the hub."""
    path = Path(artifact)
    return artifact if path.suffix in (".onnx", ".engine") or path.exists() else find_source(artifact)
