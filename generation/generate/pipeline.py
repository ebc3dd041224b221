"""Draw with a diffusers pipeline around a transformer that is no part of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from calibration.checkpoints.hub import pipeline_of_hub
from calibration.inputs.pipelines import PIPELINES
from calibration.inputs.prompts import drawing
from fp4trt.errors import BadInputs
from fp4trt.file_kind import what_it_lacks
from fp4trt.pipeline_folder import PIPELINE, index_of
from fp4trt.progress import PATIENCE_S, tracking
from fp4trt.source_folder import stands_in
from generation.generate.conditions import arguments_of
from generation.generate.passes import Transformers, in_one_pass, part_by_part
from generation.generate.request import Drawn, Request, Wanted
from generation.generate.text_encoders import TextEncoders, encoder_parts
from generation.pipelines import Model
from generation.pipelines.calls import stub_of

__all__ = ["DrawingPipeline", "find_pipeline"]

_STEPS: Final = "num_inference_steps"


def find_pipeline(model: Model, given: str | Path | None) -> Path:
    """Return the folder of the pipeline to draw with: the one that is given, or the one that the artifact lies in.

    Args:
        model: the transformer.
        given: a folder, or the name of a repository of the hub, of which no transformer's weights are downloaded.

    Raises:
        BadInputs: there is none.
        BadCheckpoint: the hub has none of that name.
    """
    if given is None:
        folder = stands_in(model.folder)
        found = next((place for place in (folder.parent, folder) if index_of(place) is not None), None)
        if found is None:
            raise BadInputs(
                f"{model.path} is not in a pipeline (no {PIPELINE} in the folder above), whose text encoders and VAE "
                "draw with it; give the pipeline's folder, or its name on the hub, as --pipeline"
            )
        return found
    root = Path(given)
    if index_of(root) is not None:
        return root
    if root.exists() or str(given).count("/") != 1 or root.is_absolute():
        lacks = f"has no {PIPELINE}" if root.is_dir() else what_it_lacks(root) if not root.exists() else "is a file"
        raise BadInputs(f"{given} {lacks}; expected the folder of a diffusers pipeline, or its name on the hub")
    return pipeline_of_hub(str(given))


class DrawingPipeline:
    """A pipeline of diffusers whose transformers are given, and whose text encoders are loaded when they are needed.

    Args:
        root: its folder.
        name: its class.
        transformers: by the names that the pipeline has them under.
        device: where its other parts compute, ``cpu`` or ``cuda``.
        low_vram: whether its parts are in memory one after the other.
        on_disk: whether text embeddings are kept for later runs.

    Raises:
        BadInputs: it cannot be loaded.
    """

    def __init__(
        self, root: Path, name: str, transformers: Transformers, device: str, *, low_vram: bool, on_disk: bool
    ) -> None:
        import diffusers
        import transformers as library  # noqa: F401 - the text encoders' library; its absence is reported in one line

        self.root, self.name, self._transformers, self._low_vram = root, name, transformers, low_vram
        stubs = {part: stub_of(each.model.family, each.model.config) for part, each in transformers.items()}
        with drawing(root):
            self._pipe: Any = getattr(diffusers, name).from_pretrained(
                root, **stubs, **dict.fromkeys(encoder_parts(root)), torch_dtype=torch.bfloat16
            )
        for part, transformer in transformers.items():
            setattr(self._pipe, part, transformer)
        self._pipe.to(device)
        self._pipe.progress_bar = self._progress_bar
        self.encoders = TextEncoders(self._pipe, root, torch.device(device), keep=not low_vram, on_disk=on_disk)
        self._label, self._steps = "", 0

    def draw(self, request: Request) -> Iterator[Drawn]:
        """Yield each picture when it is drawn.

        Raises:
            BadInputs: the pipeline does not draw.
        """
        settings = arguments_of(self.name, request)
        wanted = list(request.wanted())
        numbers = {one: index + 1 for index, one in enumerate(wanted)}

        def call(one: Wanted) -> Any:
            self._label = f"drawing {numbers[one]} of {len(wanted)}"
            generator = torch.Generator("cpu").manual_seed(one.seed)
            with drawing(self.root):
                return self._pipe(prompt=one.prompt, generator=generator, **settings)

        passes = (
            part_by_part(self._pipe, self._transformers, self.encoders, call, wanted)
            if self._low_vram
            else in_one_pass(self._pipe, self._transformers, call, wanted)
        )
        guidance = self._guidance(settings)
        for one, output in zip(wanted, passes, strict=True):
            yield self._drawn(one, output, guidance)

    def _guidance(self, settings: dict[str, Any]) -> float | None:
        """Return the scale that the pipeline is called with, by itself or by its default."""
        defaults = inspect.signature(type(self._pipe).__call__).parameters
        for key in PIPELINES[self.name].guidance:
            value = settings.get(key, defaults[key].default if key in defaults else None)
            if isinstance(value, int | float):
                return float(value)
        return None

    def _drawn(self, one: Wanted, output: Any, guidance: float | None) -> Drawn:
        if PIPELINES[self.name].frames is not None:
            sound = getattr(output, "audio", None)
            found = None if sound is None else (_samples(sound), int(self._pipe.vocoder.config.output_sampling_rate))
            return Drawn(one, tuple(output.frames[0]), "video", self._steps, guidance, found)
        first = output.images[0]
        if isinstance(first, list):
            return Drawn(one, tuple(first), "layers", self._steps, guidance)
        return Drawn(one, (first,), "picture", self._steps, guidance)

    @contextlib.contextmanager
    def _progress_bar(self, iterable: Sequence[Any] | None = None, total: int | None = None) -> Iterator[Any]:
        """Stand in for the pipeline's own bar."""
        self._steps = len(iterable) if iterable is not None else int(total or 0)
        with tracking(self._steps, self._label, PATIENCE_S) as advance:
            yield _Bar(advance)


class _Bar:
    """What a pipeline reports its steps to."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self._advance = advance

    def update(self, count: int = 1) -> None:
        self._advance(count)


def _samples(sound: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the sound of the first video, FP32 [channels, samples]."""
    first = torch.as_tensor(sound)[0].detach().float().cpu().numpy()
    return first if first.ndim == 2 else first[None]
