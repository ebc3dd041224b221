"""``fp4trt teacache``: which steps a model may leave out, fitted on recorded runs and chosen by the pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from calibration.checkpoints.threads import suited_threads
from calibration.inputs.prompts import SMALLEST, Sampling
from fp4trt import publish
from fp4trt.errors import BadOption
from fp4trt.file_output import partial_path
from fp4trt.json_file import load_json
from fp4trt.options import at_least, each_at_least, file_name, one_of, takes
from fp4trt.options import seeds as whole_seeds
from fp4trt.progress import Progress, note, tracking
from fp4trt.verb import FLAT, PEOPLE, Result, verb
from generation.comparison.metrics import PSNR
from generation.comparison.statistics import Estimate, difference, estimate
from generation.step_caching.bench import Bench, Drawing
from generation.step_caching.opening import Opened, open_source, prompts_of
from generation.step_caching.plot import refuse_plot, write_plot
from generation.step_caching.search import Asked, Point, candidates, chosen, evenly, front, tried
from generation.step_caching.settings import DECIDERS, FILE_NAME, RULES, Decider, Rule, StepCaching, model_of
from generation.step_caching.tables import table

__all__ = ["Fitted", "teacache"]

_IMAGES: Final = 20
_CHECKED: Final = 100
_HIGHEST: Final = 5
_FEWEST: Final = 4
_WHOLE: Final = 0.01


@dataclass(frozen=True, eq=False)
class Fitted(Result):
    """What :func:`teacache` found.

    Attributes:
        figures: the settings, and what was measured with them.
        settings: path of the YAML file.
        plot: path of the plot; None where none was asked for.
        table: the figures for people.
    """

    figures: Mapping[str, Any] = field(metadata=FLAT)
    settings: str
    plot: str | None
    table: str = field(metadata=PEOPLE)


def _share(value: Any) -> str | None:
    """Allow a share of the steps."""
    fit = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
    return None if fit else "a share of the steps, between 0 and 1"


def _degree(value: Any) -> str | None:
    """Allow the degree of a polynomial."""
    fit = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _HIGHEST
    return None if fit else f"a whole number from 1 to {_HIGHEST}"


@verb
@takes(
    source=file_name,
    output=file_name,
    prompts=file_name,
    pictures=file_name,
    plot=file_name,
    steps=at_least(_FEWEST),
    decider=one_of(*DECIDERS),
    reuse=one_of(*RULES),
    degree=_degree,
    skip=_share,
    first=each_at_least(1, [1, 2, 3]),
    last=each_at_least(0, [0, 1]),
    seeds=whole_seeds,
    images=at_least(1),
    check_seeds=whole_seeds,
    check_images=at_least(1),
    most=at_least(1),
    resolution=at_least(SMALLEST),
)
def teacache(
    source: str | Path,
    output: str | Path | None = None,
    *,
    steps: int | None = None,
    skip: float = 0.3,
    decider: Decider = "time",
    reuse: Rule = "linear",
    degree: int = 3,
    first: Sequence[int] = (1, 2, 3, 4),
    last: Sequence[int] = (1, 2),
    most: int = 60,
    seeds: Sequence[int] = (0, 1),
    images: int | None = None,
    check_seeds: Sequence[int] = (1000,),
    check_images: int | None = None,
    prompts: str | Path | None = None,
    pictures: str | Path | None = None,
    resolution: int | None = None,
    plot: str | Path | None = None,
    force: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Fitted:
    """Fit when a model may leave out a step, and choose how often by the pictures that it draws so.

    Runs with all steps are recorded, a polynomial is fitted from the distance of the decider's signals to that of the
    velocities, and each threshold is tried with each number of first and last steps. Of those that leave out a share of
    the steps the one is taken whose pictures are nearest to those of all steps; then it is measured on other noise.

    Args:
        source: a checkpoint, plain or quantized (``digits`` for the built-in model), or a graph in one's folder.
        output: the YAML file; None for ``teacache.yaml`` in the source's folder.
        steps: of the schedule; None for the model's own. A pipeline's has to be given.
        skip: share of the steps to leave out at least.
        decider: whose signal tells of a step before it is computed: ``time``, ``latents`` or ``modulated``.
        reuse: what stands for the velocity: the line through the last two, or the last one.
        degree: of the polynomial, 1 to 5.
        first: numbers of steps at the start to try, that are always computed.
        last: and at the end.
        most: candidates to draw with, at most.
        seeds: of the noise to fit on.
        images: of each seed; None for 20 of a model without a pipeline, or one a prompt.
        check_seeds: of the noise to measure on.
        check_images: of each of those; None for 100 of a model without a pipeline, or one a prompt.
        prompts: a text file, one a line; of a model without a pipeline, of its words.
        pictures: a picture or a folder of them, for a pipeline that reads some.
        resolution: of a pipeline's pictures, in pixels.
        plot: a file to draw the curve into: .html, .svg or .png.
        force: replace an earlier result.
        progress: called with each step.

    Raises:
        BadOption, BadCheckpoint, BadInputs, OutputExists, UnknownFamily: naming what is wrong.
    """
    if same := sorted(set(seeds) & set(check_seeds)):
        raise BadOption(f"check_seeds has {same[0]}, which is fitted on; expected other noise to measure on")
    curve = None if plot is None else refuse_plot(Path(plot), force)
    sampling = Sampling(steps, resolution, None if pictures is None else Path(pictures))
    opened = open_source(source, decider, None if prompts is None else Path(prompts), sampling)
    path = opened.folder / FILE_NAME if output is None else Path(output)
    publish.refuse_existing(path, force)
    asked = Asked(
        model_of(opened.folder), opened.steps, decider, reuse, degree, _usable(first, last, opened.steps),
        tuple(sorted(set(last))), most,
    )  # fmt: skip
    words = prompts_of(None if prompts is None else Path(prompts))
    few = None if opened.described is None else _IMAGES
    many = None if opened.described is None else _CHECKED
    with suited_threads(load_json(opened.folder / "config.json")):
        found = _search(opened.bench(seeds, words, images or few), asked, skip)
        checked = _check(opened.bench(check_seeds, words, check_images or many), found.point.settings)
    figures = found.figures | {"checked": checked, "fitted_on": _fitted_on(opened, seeds, check_seeds)}
    settings = found.point.settings.model_copy(update={"figures": figures})
    _write(path, settings.as_yaml())
    if curve is not None:
        write_plot(curve, settings)
    said = table(settings)
    return Fitted(settings.model_dump(mode="json"), str(path.resolve()), str(curve.resolve()) if curve else None, said)


def _usable(first: Sequence[int], last: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the numbers of first steps behind which there are a step to leave out and two changes to fit.

    Raises:
        BadOption: there is none.
    """
    found = tuple(number for number in sorted(set(first)) if number + max(2, min(last) + 1) <= steps)
    if not found:
        raise BadOption(
            f"first is {min(first)} and last is {min(last)} at least, which leaves too few of {steps} steps between "
            "them; expected fewer, or more --steps"
        )
    if dropped := sorted(set(first) - set(found) - {1, 2, 3, 4}):
        note(f"first {dropped[0]} is not tried: behind so many of {steps} steps there is nothing to leave out")
    return found


@dataclass(frozen=True)
class _Found:
    """What was chosen, and what the search says of it."""

    point: Point
    figures: dict[str, Any]


def _search(bench: Bench, asked: Asked, skip: float) -> _Found:
    """Record, fit, try and choose.

    Raises:
        BadOption: nothing leaves out so many steps.
    """
    with tracking(len(bench.seeds), "Recording") as advance:
        distances = bench.record(advance)
    settings = candidates(distances, asked)
    with tracking(len(settings), "Trying thresholds") as advance:
        points = tried(bench, settings, advance)
    best = front(points, PSNR.key)
    point = chosen(points, skip, PSNR.key)
    if point is None:
        most = max((one.drawing.skipped for one in points), default=0.0)
        raise BadOption(
            f"skip is {skip:g}; of {asked.steps} steps no candidate leaves out more than {most:g}: "
            "ask for less, or draw with more --steps"
        )
    counts = sorted({round(one.drawing.skipped) for one in best} - {0})
    with tracking(len(counts), "Skipping every n-th step") as advance:
        even = []
        for count in counts:
            drawing = bench.draw(point.settings, evenly(asked.steps, count))
            even.append({"skipped": count, **_means(drawing)})
            advance()
    fitted = {**point.fit.as_dict(), "degree": len(point.settings.polynomial.coefficients) - 1}
    curve = [one.as_dict() for one in best]
    return _Found(point, {"fit": fitted, "tried": len(points), "curve": curve, "every_nth": even})


def _check(bench: Bench, settings: StepCaching) -> dict[str, Any]:
    """Return how the chosen settings, and every n-th step, do on other noise."""
    with tracking(len(bench.seeds), "Drawing other noise") as advance:
        bench.record(advance)
    ours = bench.draw(settings)
    count = round(ours.skipped)
    if abs(ours.skipped - count) > _WHOLE:
        note(f"{ours.skipped:.2f} steps are left out of a picture; every n-th step is compared at {count}")
    even = evenly(settings.steps, count)
    within = evenly(settings.steps, count, settings.first, settings.last)
    others = {
        "every_nth": bench.draw(settings, even),
        "every_nth_within": bench.draw(settings, within),
        "every_nth_hold": bench.draw(settings.model_copy(update={"reuse": "hold"}), even),
    }
    found: dict[str, Any] = {"skipped": round(ours.skipped, 3), "of": settings.steps}
    reference = bench.reference()
    for metric in bench.metrics:
        entry = {"cached": _estimate(estimate(ours.scores[metric.key]))}
        if metric.absolute:
            all_steps = metric.scores(reference, reference)
            entry |= {"all_steps": _estimate(estimate(all_steps))}
            entry |= {"difference": _estimate(difference(ours.scores[metric.key], all_steps))}
        for name, other in others.items():
            entry |= {name: _estimate(estimate(other.scores[metric.key]))}
            entry |= {f"better_than_{name}": _estimate(difference(ours.scores[metric.key], other.scores[metric.key]))}
        found[metric.key] = entry
    return found


def _means(drawing: Drawing) -> dict[str, float]:
    return {key: round(float(drawing.figure(key) or 0), 4) for key in drawing.scores}


def _estimate(one: Estimate) -> dict[str, float | None]:
    """Return a mean and its 95 % interval, as the file has it."""
    figures = {"mean": one.mean, "low": one.low, "high": one.high}
    return {key: None if value is None else round(value, 4) for key, value in figures.items()}


def _fitted_on(opened: Opened, seeds: Sequence[int], checked: Sequence[int]) -> dict[str, Any]:
    """Return what was drawn, without a path."""
    kind = "a pipeline" if opened.described is None else "the model's own sampler"
    return {"seeds": list(seeds), "check_seeds": list(checked), "drawn_by": kind}


def _write(path: Path, text: str) -> None:
    partial = partial_path(path)
    try:
        publish.write_text(partial, text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
