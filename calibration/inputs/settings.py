"""How prompts are sampled, and what of it a pipeline does not take."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from calibration.inputs.pipelines import PIPELINES, Pipeline
from fp4trt.errors import BadEnvironment, BadInputs
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import index_of

__all__ = ["Sampling", "refuse_missing_package", "refuse_of_pipelines", "refuse_settings"]

_NEEDING_TORCHVISION: Final = ("PixtralProcessor", "Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor")
"""Processors of transformers that cannot be loaded without it, even for text."""


@dataclass(frozen=True)
class Sampling:
    """How the prompts of a pipeline are sampled; None leaves a setting to the pipeline.

    Attributes:
        steps: of the schedule.
        resolution: pixels of a side.
        pictures: a picture or a folder of them, for a pipeline that reads some beside the prompts.
        frames: of a video.
        guidance: scale of the guidance.
    """

    steps: int | None = None
    resolution: int | None = None
    pictures: Path | None = None
    frames: int | None = None
    guidance: float | None = None

    def as_arguments(self, called: Pipeline) -> dict[str, int | float]:
        """Return what a pipeline of a class is called with."""
        settings: dict[str, int | float | None] = {"num_inference_steps": self.steps}
        settings |= dict.fromkeys(called.resolution, self.resolution) | dict.fromkeys(called.guidance, self.guidance)
        if called.frames is not None:
            settings[called.frames] = self.frames
        return {name: value for name, value in settings.items() if value is not None}


def refuse_of_pipelines(sampling: Sampling) -> None:
    """Refuse settings that only a pipeline has, where none is sampled.

    Raises:
        BadInputs: naming the first of them.
    """
    for option, value in (("--frames", sampling.frames), ("--guidance", sampling.guidance)):
        if value is not None:
            raise BadInputs(f"{option} {value:g} was given, but no pipeline is sampled: leave it out")


def refuse_settings(root: Path, name: str, sampling: Sampling) -> None:
    """Refuse what pipelines of a class do not take, before one is loaded.

    Args:
        root: the pipeline's folder.
        name: of its class.
        sampling: what is asked of it.

    Raises:
        BadInputs: naming the option.
    """
    called, side = PIPELINES[name], sampling.resolution
    refused = f"was given, but {root} is a {name}, which"
    if sampling.frames is not None and called.frames is None:
        raise BadInputs(f"--frames {sampling.frames} {refused} draws pictures: leave it out")
    if sampling.guidance is not None and not called.guidance:
        raise BadInputs(f"--guidance {sampling.guidance:g} {refused} takes no scale of a guidance: leave it out")
    if side is None:
        return
    if called.resolutions and side not in called.resolutions:
        sides = " or ".join(map(str, called.resolutions))
        raise BadInputs(f"--resolution {side} {refused} draws {sides} pixels alone: give one of these")
    if side % called.multiple:
        above = side - side % called.multiple + called.multiple
        raise BadInputs(f"--resolution {side} {refused} draws multiples of {called.multiple} pixels: give {above}")


def refuse_missing_package(root: Path, name: str) -> None:
    """Refuse a pipeline that fails without a package that neither diffusers nor transformers bring.

    Args:
        root: the pipeline's folder.
        name: of its class.

    Raises:
        BadEnvironment: naming the package.
    """
    index = index_of(root)
    parts = [] if index is None else load_json(index).values()
    classes = [part[1] for part in parts if isinstance(part, list) and len(part) > 1]
    needs = [(PIPELINES[name].needs, name, "")]
    needs += [("torchvision", one, " in the build (CPU or CUDA) of your torch") for one in _NEEDING_TORCHVISION]
    for package, of, build in needs:
        if package is not None and of in (name, *classes) and importlib.util.find_spec(package) is None:
            raise BadEnvironment(f"{root} has a {of}, which needs {package}; install the package {package}{build}")
