"""The metrics of ``fp4trt compare`` over albums, each kept on disk once it is computed."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from protocol.album import Album, saved
from protocol.prompts import Asked

from fp4trt.progress import note
from fp4trt.version import __version__
from generation.comparison.measurement import Comparison, measure
from generation.comparison.metrics import Metric, Shown, likeness
from generation.comparison.perceptual import perceptual_metrics
from generation.comparison.statistics import Scores

SEED = 0
"""The one block of images: each has noise of its own."""


def compared(baseline: Album, albums: Sequence[Album], asked: Sequence[Asked]) -> Comparison:
    """Measure how far the images of some models are from the baseline's.

    Args:
        baseline: its images.
        albums: the others'.
        asked: which images.
    """
    prompts = tuple(one.prompt for one in asked)
    shown = {album.label: _shown(album, asked, prompts) for album in (baseline, *albums)}
    folders = {shown[album.label]: album.folder / "scores" for album in (baseline, *albums)}
    near, missing = likeness()
    learned, absent = perceptual_metrics()
    fit, broken = _tried(learned, baseline, asked)
    what = hashlib.sha256("\n".join([__version__, *(one.stem for one in asked)]).encode()).hexdigest()[:16]
    metrics = [_kept(metric, folders, what) for metric in (*near, *fit)]
    reference = shown.pop(baseline.label)
    found = measure(metrics, reference, shown, {**missing, **absent, **broken})
    for title, reason in found.unavailable.items():
        note(f"{title} is left out: {reason}")
    return found


def _shown(album: Album, asked: Sequence[Asked], prompts: tuple[str, ...]) -> Shown:
    return Shown((SEED,), prompts, lambda _: album.parts(asked))


def _tried(metrics: Sequence[Metric], baseline: Album, asked: Sequence[Asked]) -> tuple[list[Metric], dict[str, str]]:
    """Return the metrics that take an image of the baseline, and of the others the title and what they raised.

    They are other people's programs, whose versions may not fit each other; hours of drawing are not lost to that. What
    is no mean over images is not tried: a Frechet distance of 2048 features takes a minute.
    """
    fit, broken = [], {}
    for metric in metrics:
        one = _shown(baseline, asked[:1], (asked[0].prompt,))
        try:
            if metric.least == 1:
                metric.scores(one, one)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            broken[metric.title] = f"it fails here ({type(error).__name__}: {reason}); see docs/dependencies.md"
        else:
            fit.append(metric)
    return fit, broken


def _kept(metric: Metric, folders: Mapping[Shown, Path], what: str) -> Metric:
    """Return a metric whose scores are read from disk where they are there, and written where they are not.

    Args:
        metric: that computes them.
        folders: of each model's scores, in that of its images: they go with these.
        what: tells the images, and the program that judged them.
    """

    def scores(shown: Shown, reference: Shown) -> Scores:
        file = folders[shown] / f"{metric.key}-{what}.json"
        if not file.is_file():
            found = metric.scores(shown, reference)
            text = json.dumps({"figures": found.figures.tolist(), "values": found.values.tolist()})
            saved(file, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        stored = json.loads(file.read_text(encoding="utf-8"))
        return Scores(np.array(stored["figures"]), np.array(stored["values"]))

    return replace(metric, scores=scores)
