"""``fp4trt compare``: the same prompts and noise through a BF16 reference and several quantized checkpoints."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from calibration.checkpoints.plain import find_source, load_source, refuse_quantized
from calibration.checkpoints.quantized import Checkpoint, load, plain_config, read
from calibration.checkpoints.threads import suited_threads
from calibration.inputs.pixel_space import describe
from calibration.inputs.prompts import SMALLEST, Sampling, read_prompts, refuse_sampling
from calibration.pixel_space.description import Description
from fp4trt import publish
from fp4trt.checkpoint_folder import files_of
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import BadCheckpoint, BadInputs
from fp4trt.families import Family, family_of
from fp4trt.json_file import load_json
from fp4trt.options import at_least, file_name, mapping, takes
from fp4trt.options import seeds as whole_seeds
from fp4trt.progress import PATIENCE_S, Progress, note, tracking
from fp4trt.safetensors_file import sha256_of
from fp4trt.verb import FLAT, PEOPLE, Result, verb
from generation.comparison import metrics as known
from generation.comparison.drawing import Sampler, as_unit, follow
from generation.comparison.grid import draw_grid
from generation.comparison.measurement import Comparison, measure
from generation.comparison.metrics import Metric, Shown
from generation.comparison.pictures import pictured
from generation.comparison.report import AMPLIFIED, NO_PLOTS, has_plots, write_report
from generation.comparison.store import Store
from generation.comparison.table import table

__all__ = ["DATA", "GRID", "PAGE", "compare", "opened"]

DATA: Final = "compare.json"
PAGE: Final = "compare.html"
GRID: Final = "grid.png"
FORMAT: Final = "fp4trt compare 1"
"""What tells our compare.json from another."""

_WORK: Final = "finished"
_COLUMNS: Final = 10
_SHOWN: Final = 12
_IMAGES: Final = 500
_VERSIONED: Final = ("torch", "diffusers", "numpy")


@dataclass(frozen=True)
class _Task:
    """What is compared.

    Attributes:
        folder: the plain checkpoint.
        family: its family.
        described: how it is sampled without a pipeline; None where it has one.
        checkpoints: name to quantized checkpoint, in the order given.
        seeds: of the noise.
        sampler: what draws.
        dtype: to compute in: FP32 for a model without a pipeline, BF16 for one with.
    """

    folder: Path
    family: Family
    described: Description | None
    checkpoints: Mapping[str, Checkpoint]
    seeds: tuple[int, ...]
    sampler: Sampler
    dtype: torch.dtype

    def identity(self) -> str:
        """Return what tells the reference's images from any other's: finished work of another is of no use."""
        parts = [_file_stamps(self.folder), self.sampler.prompts, dict(self.sampler.described), str(self.dtype)]
        versions = [importlib.metadata.version(name) for name in _VERSIONED]
        return hashlib.sha256(json.dumps([*parts, versions], sort_keys=True).encode()).hexdigest()

    def key(self, name: str) -> str:
        """Return the name of a checkpoint's finished work: of what the checkpoint is, whatever it is called."""
        stamps = _file_stamps(self.checkpoints[name].directory)
        return hashlib.sha256(json.dumps(stamps, sort_keys=True).encode()).hexdigest()[:24]


def _file_stamps(folder: Path) -> dict[str, tuple[str, int, int]]:
    stats = {file: file.stat() for file in (folder / "config.json", *files_of(folder))}
    return {file.name: (str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}


@dataclass(frozen=True, eq=False)
class Compared(Result):
    """What :func:`compare` found.

    Attributes:
        figures: what compare.json holds: what was compared, and how far apart it is.
        data: path of compare.json.
        report: path of compare.html.
        grid: path of grid.png.
        table: the figures for people.
    """

    figures: Mapping[str, Any] = field(metadata=FLAT)
    data: str
    report: str
    grid: str
    table: str = field(metadata=PEOPLE)


@verb
@takes(
    source=file_name,
    output=file_name,
    prompts=file_name,
    checkpoints=mapping({"ptq": "flux-fp4"}),
    seeds=whole_seeds,
    images=at_least(1),
    steps=at_least(1),
    resolution=at_least(SMALLEST),
)
def compare(
    source: str | Path,
    checkpoints: Mapping[str, str | Path],
    output: str | Path,
    *,
    seeds: Sequence[int] = (1000, 1001, 1002),
    images: int | None = None,
    prompts: str | Path | None = None,
    steps: int | None = None,
    resolution: int | None = None,
    force: bool = False,
    pictures: str | Path | None = None,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Compared:
    """Draw the same images with a plain model and its quantized checkpoints, and say how far apart they are.

    One model is in memory at a time. Each finished pair of checkpoint and seed is kept in ``OUTPUT.partial`` until the
    result is written, also for a later command that names other checkpoints or seeds.

    Args:
        source: the plain BF16 checkpoint (``digits``, the transformer of a pipeline's folder, or a checkpoint with a
            ``sampling.json``).
        checkpoints: name to quantized checkpoint; differences are told to the first.
        output: folder of the result: compare.json, compare.html, grid.png.
        seeds: of the noise; calibration of the built-in model takes 0 to 3.
        images: of each seed; None for 500 of a model without a pipeline, or one a prompt.
        prompts: a text file, one a line; of a model without a pipeline, of its words.
        steps: denoising steps; None for the model's own.
        resolution: of a pipeline's images, in pixels; None for its own.
        force: replace an earlier result.
        pictures: a picture or a folder of them, which the images take in turn; for a pipeline that reads some.
        progress: called with each step.

    Raises:
        BadOption, BadCheckpoint, BadInputs, OutputExists, UnknownFamily: naming what is wrong.
    """
    directory = Path(output)
    sampling = Sampling(steps, resolution, None if pictures is None else Path(pictures))
    task = _task(find_source(source), checkpoints, seeds, images, prompts, sampling)
    ours = (DATA, PAGE, GRID) if _is_comparison(directory) else ()
    if not has_plots():
        note(NO_PLOTS)
    few = suited_threads(load_json(task.folder / "config.json"))
    with few, publish.replacing(directory, force, task.identity(), ours) as partial:
        store = Store(partial / _WORK)
        _draw(task, store, lambda: publish.note_progress(partial, {"compared": list(task.checkpoints)}))
        comparison = _measured(task, store)
        result = {**_described(task), **comparison.as_dict()}
        publish.write_json(partial / DATA, result)
        _draw_grid(task, store, partial / GRID)
        shown = pictured(*_first_images(task, store, _SHOWN))
        write_report(comparison, _described(task), shown, partial / PAGE)
        shutil.rmtree(store.folder)
    files = {"data": DATA, "report": PAGE, "grid": GRID}
    paths = {key: str((directory / name).resolve()) for key, name in files.items()}
    return Compared(result, **paths, table=table(comparison))


def _task(
    folder: Path,
    checkpoints: Mapping[str, str | Path],
    seeds: Sequence[int],
    images: int | None,
    prompts: str | Path | None,
    sampling: Sampling,
) -> _Task:
    if not checkpoints or not seeds or len(set(seeds)) < len(seeds):
        raise BadInputs(
            f"{len(checkpoints)} checkpoints and the seeds {list(seeds)} were given; expected at least one of each, "
            "and each seed once"
        )
    config = load_json(folder / "config.json")
    refuse_quantized(folder, config)
    family = family_of(config, folder)
    refuse_sampling(folder, family, prompts, sampling)
    found = {name: opened(name, Path(path), config) for name, path in checkpoints.items()}
    asked = None if prompts is None else read_prompts(Path(prompts))
    described = describe(folder, family)
    if described is None:
        sampler, dtype = _pipeline_sampler(folder, family, asked, images, sampling), torch.bfloat16
    else:
        sampler, dtype = _pixel_sampler(family, described, asked, images, sampling), torch.float32
    return _Task(folder, family, described, found, tuple(seeds), sampler, dtype)


def opened(name: str, path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Return a quantized checkpoint that was made from the source of a config.

    Raises:
        BadCheckpoint: it was made from another, or is none.
    """
    checkpoint = read(path)
    # diffusers notes its own version and where it loaded from; all else decides what the model is.
    ours, theirs = (
        {key: value for key, value in plain_config(one).items() if key not in ("_diffusers_version", "_name_or_path")}
        for one in (config, checkpoint.config)
    )
    differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if differing:
        key = differing[0]
        raise BadCheckpoint(
            f"{name} ({path}) has {key} {theirs.get(key)!r}, the source {ours.get(key)!r}; compare checkpoints that "
            "were quantized from this source"
        )
    return checkpoint


def _pixel_sampler(
    family: Family, described: Description, prompts: list[str] | None, images: int | None, sampling: Sampling
) -> Sampler:
    from generation.comparison.pixel_space import pixel_sampler

    if sampling.resolution is not None:
        side = described.image.size
        raise BadInputs(f"--resolution is of a pipeline; this model draws {side} x {side} pixels: leave it out")
    known = described.prompts if prompts is None else described.known(prompts)
    asked = [known[index % len(known)] for index in range(images or _IMAGES)]
    return pixel_sampler(family, described, asked, sampling.steps)


def _pipeline_sampler(
    folder: Path, family: Family, prompts: list[str] | None, images: int | None, sampling: Sampling
) -> Sampler:
    if prompts is None:
        raise BadInputs(f"{folder} needs prompts to draw; give --prompts, a text file with one a line")
    from generation.comparison.pipeline import pipeline_sampler

    return pipeline_sampler(folder, family, prompts, images or len(prompts), sampling)


def _is_comparison(directory: Path) -> bool:
    """Whether a folder holds a result of ours."""
    try:
        return load_json(directory / DATA).get("format") == FORMAT
    except (BadCheckpoint, OSError):
        return False


def _draw(task: _Task, store: Store, kept: Callable[[], None]) -> None:
    """Draw what is missing, the reference's images first, one model in memory at a time."""
    batches = range(task.sampler.batches)
    seeds = [seed for seed in task.seeds if not all(store.has_batch(seed, index) for index in batches)]
    # Two names of one checkpoint are one.
    missing = {
        task.key(name): (checkpoint, [seed for seed in task.seeds if not store.has(task.key(name), seed)])
        for name, checkpoint in task.checkpoints.items()
    }
    pairs = sum(len(absent) for _, absent in missing.values())
    if done := len(task.seeds) * len(missing) - pairs:
        note(f"resuming: {done} of {done + pairs} pairs of checkpoint and seed are finished")
    with tracking((len(seeds) + 2 * pairs) * len(batches), "Drawing", PATIENCE_S) as advance:
        reference = load_source(task.folder, task.dtype) if seeds else None
        for seed in seeds:
            assert reference is not None
            for index, batch in enumerate(task.sampler.draw(reference, seed)):
                store.keep_batch(seed, index, batch)
                advance()
            kept()
        del reference
        for key, (checkpoint, absent) in missing.items():
            if not absent:
                continue
            model = load(checkpoint.directory, dtype=task.dtype)
            for seed in absent:
                store.keep(key, seed, follow(task.sampler, model, seed, store.batches(seed, len(batches)), advance))
                kept()
            del model


def _measured(task: _Task, store: Store) -> Comparison:
    count, prompts = task.sampler.batches, task.sampler.prompts
    reference = Shown(task.seeds, prompts, lambda seed: [as_unit(store.reference_images(seed, count))])

    def shown(key: str) -> Shown:
        return Shown(
            task.seeds,
            prompts,
            lambda seed: [as_unit(store.drawn(key, seed).images)],
            lambda seed: store.drawn(key, seed),
        )

    metrics, unavailable = _metrics(task)
    found = measure(metrics, reference, {name: shown(task.key(name)) for name in task.checkpoints}, unavailable)
    for title, reason in found.unavailable.items():
        note(f"{title} is left out: {reason}")
    return found


def _metrics(task: _Task) -> tuple[list[Metric], dict[str, str]]:
    """Return what can be measured of a task's images, and what cannot and why."""
    near, no_ssim = known.likeness()
    further: list[Metric]
    missing: dict[str, str]
    if task.described is not None:
        from generation.comparison.pixel_space import classifier_metrics

        further, missing = classifier_metrics(task.described, task.folder, task.sampler.prompts), {}
    else:
        from generation.comparison.perceptual import perceptual_metrics

        further, missing = perceptual_metrics()
    return [*near, known.VELOCITY, *further], {**no_ssim, **missing}


def _described(task: _Task) -> dict[str, Any]:
    """Return what was compared, without a path: only names."""
    return {
        "format": FORMAT,
        "family": task.family.name,
        "recipes": {name: checkpoint.recipe for name, checkpoint in task.checkpoints.items()},
        "manifests": {name: _manifest_hash(checkpoint) for name, checkpoint in task.checkpoints.items()},
        "bytes": {
            name: sum(file.stat().st_size for file in files_of(checkpoint.directory))
            for name, checkpoint in task.checkpoints.items()
        },
        "seeds": list(task.seeds),
        "images_per_seed": len(task.sampler.prompts),
        "prompts": list(dict.fromkeys(task.sampler.prompts)),
        "sampling": dict(task.sampler.described),
        "computed_in": str(task.dtype).removeprefix("torch."),
    }


def _manifest_hash(checkpoint: Checkpoint) -> str | None:
    """Return the SHA-256 of a checkpoint's manifest, which holds those of its files."""
    path = checkpoint.directory / MANIFEST
    return sha256_of(path) if path.is_file() else None


def _first_images(
    task: _Task, store: Store, count: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[str, ...]]:
    """Return some of the first seed's images, by the reference and by each checkpoint, and their prompts."""
    seed, some = task.seeds[0], slice(0, count)
    reference = as_unit(store.reference_images(seed, task.sampler.batches)[some])
    others = {name: as_unit(store.drawn(task.key(name), seed).images[some]) for name in task.checkpoints}
    return reference, others, task.sampler.prompts[some]


def _draw_grid(task: _Task, store: Store, path: Path) -> None:
    draw_grid(*_first_images(task, store, _COLUMNS), path, AMPLIFIED)
