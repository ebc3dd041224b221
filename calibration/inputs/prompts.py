"""From prompts to captured transformer inputs: run the family's pipeline over its whole schedule and listen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from calibration.inputs.captured import Inputs, capturing
from calibration.inputs.modular import load_modular
from calibration.inputs.pictures import class_of, conditions_of
from calibration.inputs.pipelines import PIPELINES
from calibration.inputs.pixel_space import describe
from calibration.inputs.settings import Sampling, refuse_missing_package, refuse_of_pipelines, refuse_settings
from calibration.pixel_space.description import Description, Run
from calibration.pixel_space.sampling import capture
from fp4trt.errors import BadInputs
from fp4trt.families import Family
from fp4trt.file_kind import what_it_is, what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import PIPELINE, index_of
from fp4trt.progress import tracking
from fp4trt.source_folder import stands_in

__all__ = [
    "SMALLEST",
    "Sampling",
    "capture_prompts",
    "drawing",
    "load_pipeline",
    "pipeline_of",
    "read_prompts",
    "refuse_no_data",
    "refuse_sampling",
]


SMALLEST: Final = 16
"""Pixels of a picture's side that a pipeline is asked for, at least."""

_SECOND: Final = "transformer_2"
"""The part of a pipeline of two transformers that it calls at the less noisy timesteps."""

_POINTER: Final = "version https://git-lfs"
"""What a Git LFS pointer begins with, which is text as prompts are."""


def capture_prompts(
    model: nn.Module, folder: Path, family: Family, prompts: str | Path | None, sampling: Sampling
) -> list[Inputs]:
    """Return every call that sampling the prompts makes of the transformer.

    Args:
        model: the transformer, loaded from ``folder``.
        folder: its checkpoint; the pipeline (text encoders, tokenizers, scheduler) is expected in the parent folder.
        family: the model's family.
        prompts: a text file, one prompt a line; None for those that a model without a pipeline brings along.
        sampling: of a pipeline; a model without one has its own schedule.

    Raises:
        BadInputs: there are no prompts, or no pipeline to run them.
    """
    described = describe(folder, family)
    if described is not None:
        return _capture_pixels(model, family, described, None if prompts is None else read_prompts(Path(prompts)))
    if prompts is None:
        raise _without_data(folder)
    return _capture_pipeline(model, folder, family, read_prompts(Path(prompts)), sampling)


def refuse_no_data(folder: Path, family: Family, prompts: str | Path | None) -> None:
    """Refuse a model without captured inputs or prompts, before it is loaded; one without a pipeline has its own.

    Raises:
        BadInputs: naming the model.
    """
    if prompts is None and describe(folder, family) is None:
        raise _without_data(folder)


def _without_data(folder: Path) -> BadInputs:
    return BadInputs(f"{folder} needs calibration data; give captured inputs, or prompts, or an amax.json")


def refuse_sampling(folder: Path, family: Family, prompts: str | Path | None, sampling: Sampling) -> None:
    """Refuse what the pipeline around a transformer cannot be sampled with, before it is loaded.

    Raises:
        BadInputs: as :func:`capture_prompts`.
        BadEnvironment: a package is missing that the pipeline needs.
    """
    alone = describe(folder, family) is not None
    if sampling.pictures is not None and (alone or prompts is None):
        what = "this model reads no pictures" if alone else "pictures go with --prompts"
        raise BadInputs(f"--pictures {sampling.pictures} was given, but {what}: leave it out")
    if alone or prompts is None:
        refuse_of_pipelines(sampling)
    if not alone and prompts is not None:
        read_prompts(Path(prompts))
        root = pipeline_of(folder)
        conditions = conditions_of(root, load_json(folder / "config.json"), sampling.pictures)
        refuse_settings(root, conditions.pipeline, sampling)
        refuse_missing_package(root, conditions.pipeline)


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank.

    Raises:
        BadInputs: there are none, or there is no such file.
    """
    if path.is_dir():
        raise BadInputs(f"{path} is a folder; expected a text file, one prompt a line")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise BadInputs(f"{path} {what_it_lacks(path)}; expected a text file, one prompt a line") from None
    except UnicodeDecodeError as error:
        kind = what_it_is(path) or f"is not UTF-8 text ({error})"
        raise BadInputs(f"{path} {kind}; expected one prompt a line") from None
    if lines and lines[0].startswith(_POINTER):
        raise BadInputs(f"{path} {what_it_is(path)}; expected one prompt a line")
    prompts = [line for line in lines if line]
    if not prompts:
        raise BadInputs(f"{path} holds no prompt; expected one a line")
    return prompts


def _capture_pixels(
    model: nn.Module, family: Family, described: Description, prompts: list[str] | None
) -> list[Inputs]:
    """Draw what a model without a pipeline is calibrated on, or with the same seeds some other prompts."""
    runs: Sequence[Run] = described.calibration
    if prompts is not None:
        asked = described.known(prompts)
        runs = [run.model_copy(update={"prompts": asked}) for run in runs]
    return capture(family, described, model, runs, dtype=torch.bfloat16)


def pipeline_of(folder: Path) -> Path:
    """Return the pipeline's folder around a transformer's, or around the one in whose place a single file is taken.

    Raises:
        BadInputs: there is none.
    """
    place = stands_in(folder)
    if index_of(place.parent) is None:
        raise BadInputs(
            f"{place} is not in a pipeline (no {PIPELINE} in the folder above), whose text encoders the prompts need; "
            "give the pipeline's folder, or that of a single file's pipeline with --like"
        )
    return place.parent


@contextlib.contextmanager
def drawing(root: Path) -> Iterator[None]:
    """Tell in one line that a pipeline cannot be loaded or does not draw, in diffusers' own words.

    Raises:
        BadInputs: naming the pipeline.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        if hasattr(error, "exit_code"):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInputs(f"{root} does not draw ({reason}); expected a pipeline that draws in diffusers") from error


def load_pipeline(root: Path, transformer: Any, part: str = "transformer") -> Any:
    """Return the BF16 pipeline in a folder around a transformer, on the GPU where there is one, without a bar.

    Args:
        root: the folder.
        transformer: one of its parts.
        part: the name of that.
    """
    import diffusers
    import transformers  # noqa: F401 - the text encoders' library; its absence is reported in one line

    # By DiffusionPipeline itself a part that the class makes optional, as Wan's transformers are, would be loaded anew.
    load: Any = getattr(diffusers, class_of(root)).from_pretrained
    named = load_json(root / PIPELINE).get("transformer")
    if isinstance(named, list) and named[:1] == ["diffusers"] and not hasattr(diffusers, str(named[-1])):
        own = next(cls.__name__ for cls in type(transformer).__mro__ if hasattr(diffusers, cls.__name__))
        raise BadInputs(
            f"{root / PIPELINE} names {named[-1]}, which diffusers has not, as its transformer; write {own}"
        )
    with drawing(root):
        pipeline = load(root, **{part: transformer}, torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.enable_model_cpu_offload()
    return pipeline


def _capture_pipeline(
    model: nn.Module, folder: Path, family: Family, prompts: list[str], sampling: Sampling
) -> list[Inputs]:
    """Sample every prompt, on the GPU where there is one, and keep every call of the transformer."""
    root, config = pipeline_of(folder), load_json(folder / "config.json")
    conditions = conditions_of(root, config, sampling.pictures)
    called, part = PIPELINES[conditions.pipeline], stands_in(folder).name
    if called.blocks is None:
        pipeline = load_pipeline(root, model, part if part == _SECOND else "transformer")
    else:
        pipeline = load_modular(root, model, called.blocks)
    with capturing(model, family, config) as calls, tracking(len(prompts), "sampling prompts") as advance:
        for seed, prompt in enumerate(prompts):
            settings = sampling.as_arguments(called) | conditions.arguments(seed, sampling.resolution)
            generator = torch.Generator().manual_seed(seed)
            with drawing(root):
                pipeline(prompt=prompt, generator=generator, **called.settings, **settings)
            advance()
    if not calls:
        raise BadInputs(f"{root} never called its {part}; expected a call at least: sample more --steps")
    return calls
