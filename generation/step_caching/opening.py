"""What step caching is fitted on: a model, what draws with it, and what judges the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from calibration.checkpoints.plain import find_source, load_source
from calibration.checkpoints.quantized import load
from calibration.inputs.pixel_space import describe
from calibration.inputs.prompts import Sampling, read_prompts, refuse_sampling
from calibration.pixel_space.description import Description
from fp4trt.account import is_quantized_checkpoint
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadInputs, BadOption
from fp4trt.families import Family, family_of
from fp4trt.json_file import load_json
from generation.comparison.drawing import Sampler
from generation.comparison.metrics import PSNR, Metric
from generation.step_caching.bench import Bench
from generation.step_caching.deciders import Signal, signal_of
from generation.step_caching.front import modulated_signal
from generation.step_caching.settings import Decider
from generation.transformer import GraphTransformer

__all__ = ["Opened", "open_source", "prompts_of"]

_GRAPH: Final = ".onnx"


@dataclass(frozen=True)
class Opened:
    """A model to fit step caching for.

    Attributes:
        folder: of its checkpoint.
        family: of it.
        described: how it is sampled without a pipeline; None where it has one.
        model: the transformer.
        signal: of the decider.
        sampling: steps and resolution, as asked for.
        steps: of the schedule.
    """

    folder: Path
    family: Family
    described: Description | None
    model: Any
    signal: Signal
    sampling: Sampling
    steps: int

    def bench(self, seeds: Sequence[int], prompts: Sequence[str] | None, images: int | None) -> Bench:
        """Return what draws some pictures of each seed.

        Args:
            seeds: of the noise.
            prompts: which the pictures take in turn; None for the model's own.
            images: of each seed; None for one a prompt.

        Raises:
            BadInputs: a prompt is not one of the model's, or there is no pipeline.
        """
        sampler, metrics = self._drawn(prompts, images)
        piped = self.described is None
        return Bench(sampler, self.model, self.family, metrics, tuple(seeds), self.steps, self.signal, piped)

    def _drawn(self, prompts: Sequence[str] | None, images: int | None) -> tuple[Sampler, list[Metric]]:
        if self.described is None:
            from generation.comparison.pipeline import pipeline_sampler

            assert prompts is not None  # refuse_sampling
            sampler = pipeline_sampler(self.folder, self.family, prompts, images or len(prompts), self.sampling)
            return sampler, [PSNR]
        from generation.comparison.pixel_space import classifier_metrics, pixel_sampler

        words = self.described.prompts if prompts is None else self.described.known(list(prompts))
        asked = [words[index % len(words)] for index in range(images or len(words))]
        judged = classifier_metrics(self.described, self.folder, asked)
        recognised = [metric for metric in judged if metric.key == "recognised"]
        return pixel_sampler(self.family, self.described, asked, self.steps), [PSNR, *recognised]


def open_source(source: str | Path, decider: Decider, prompts: Path | None, sampling: Sampling) -> Opened:
    """Return a checkpoint, plain or quantized, or a graph in one's folder, ready to draw.

    Raises:
        BadCheckpoint, BadGraph, UnknownFamily: it is damaged, or of no family of ours.
        BadInputs: there is no pipeline to draw with, or it takes no such settings.
        BadOption: a pipeline is to draw with a graph, or in an unknown number of steps.
    """
    graph = Path(source) if Path(source).suffix == _GRAPH else None
    folder = find_source(source) if graph is None else graph.parent
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    described = describe(folder, family)
    if described is None and prompts is None:
        raise BadInputs(f"{folder} needs prompts to draw; give --prompts, a text file with one a line")
    if described is not None and sampling.resolution is not None:
        side = described.image.size
        raise BadInputs(f"--resolution is of a pipeline; this model draws {side} x {side} pixels: leave it out")
    if described is None and graph is not None:
        raise BadOption(f"source is {graph}; expected a checkpoint where a pipeline draws: give {folder}")
    refuse_sampling(folder, family, prompts, sampling)
    if described is None and sampling.steps is None:
        raise BadOption("steps is None; expected the number that the pipeline is to draw in: give --steps")
    steps = sampling.steps or (described.steps if described is not None else 0)
    dtype = torch.bfloat16 if described is None else torch.float32
    signal = modulated_signal(folder, dtype) if decider == "modulated" else signal_of(decider, family)
    model: Any = _model(folder, config, dtype) if graph is None else GraphTransformer(graph)
    return Opened(folder, family, described, model, signal, sampling, steps)


def _model(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    if is_quantized_checkpoint(config, tensors_in_folder(folder)):
        return load(folder, dtype=dtype)
    return load_source(folder, dtype)


def prompts_of(path: Path | None) -> list[str] | None:
    """Return the prompts of a text file; None without one."""
    return None if path is None else read_prompts(path)
