"""What a run found: a table for the terminal, JSON, and one HTML file with pictures."""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from protocol import published
from protocol.album import Album, saved
from protocol.prompts import Asked
from protocol.published import Likeness

from fp4trt.html_page import page
from generation.comparison.measurement import Comparison
from generation.comparison.metrics import Metric
from generation.comparison.report import differences, figures, left_out, meanings
from generation.comparison.table import aligned, estimate_text, table

SHOWN = 4
"""Prompts with the largest differences, and as many with median ones, whose pictures are in the report."""

_SIDE = 512
_QUALITY = 85
_COLUMNS = {"lpips": "LPIPS", "psnr_db": "PSNR, dB", "image_reward": "ImageReward"}
_METHOD = """
Every model drew the same prompts from the same noise. Intervals are of 95 %: Student's t over the images. A difference
is paired: it is each image's difference that counts. A Frechet distance is no mean over images; it enters by its
jackknife pseudo-values. The intervals are not corrected for how many of them are looked at.
"""
_PHONE = """
figure { display: flex; flex-wrap: wrap; gap: .5em } figure div { flex: 1 1 150px; max-width: 512px }
figure img { width: 100% } .wide { overflow-x: auto }
"""


@dataclass(frozen=True)
class Found:
    """What a run found.

    Attributes:
        comparison: the figures.
        asked: the images.
        albums: the baseline's first.
        described: settings and models, as JSON.
        alike: in what the run is like the published one.
    """

    comparison: Comparison
    asked: Sequence[Asked]
    albums: Sequence[Album]
    described: Mapping[str, Any]
    alike: Sequence[Likeness]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON."""
        return {
            **self.described,
            **self.comparison.as_dict(),
            "published": published.as_json(self.alike),
            "images": [
                {
                    "name": one.name,
                    "prompt": one.prompt,
                    "seed": one.seed,
                    "file": f"{one.stem}.png",
                    **self._values(at),
                }
                for at, one in enumerate(self.asked)
            ],
        }

    def _values(self, image: int) -> dict[str, dict[str, float]]:
        """Return label to metric to value of one image, of the metrics that have one for each."""
        count, found = len(self.asked), self.comparison.checkpoints
        return {
            label: {key: float(of.values[0, image]) for key, of in scores.items() if of.values.shape[1] == count}
            for label, scores in found.items()
        }

    @property
    def metric(self) -> Metric:
        """What pictures are chosen by: LPIPS where it could be computed, and PSNR."""
        metrics = {metric.key: metric for metric in self.comparison.metrics}
        return metrics.get("lpips", metrics["psnr_db"])

    def by_difference(self) -> list[int]:
        """Return the images in the order of their mean difference over the models, the largest first."""
        metric = self.metric
        values = [scores[metric.key].values[0] for scores in self.comparison.checkpoints.values()]
        mean = np.mean(values, axis=0)
        return np.argsort(mean if metric.higher_is_better else -mean, kind="stable").tolist()


def printed(found: Found) -> str:
    """Return the tables for the terminal."""
    rows = [["", *_COLUMNS.values(), "FID"], *_beside(found.comparison)]
    lines = [f"{one.what}: {one.theirs} | {one.ours}" for one in found.alike if one.alike is False]
    missing = [f"{title}: {reason}" for title, reason in found.comparison.unavailable.items()]
    parts = [
        table(found.comparison),
        f"beside what deepcompressor publishes ({published.COUNT} prompts)\n{aligned(rows)}",
        "\n".join(["not alike (theirs | here):", *lines]),
        *(["\n".join(["left out:", *missing])] if missing else []),
    ]
    return "\n\n".join(parts)


def _beside(comparison: Comparison) -> list[list[str]]:
    """Return the published rows and ours, as text."""
    theirs = [
        [f"published: {row.method}", *(_number(asdict(row)[key]) for key in (*_COLUMNS, "fid"))]
        for row in published.TABLE
    ]
    metrics = {metric.key: metric for metric in comparison.metrics}
    ours = [
        [f"here: {label}", *(_ours(comparison, label, metrics.get(key)) for key in _COLUMNS), "not comparable"]
        for label in comparison.checkpoints
    ]
    return [*theirs, *ours]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _ours(comparison: Comparison, label: str, metric: Metric | None) -> str:
    return "left out" if metric is None else estimate_text(metric, comparison.estimate(label, metric.key))


def write_page(found: Found, path: Path) -> None:
    """Write the HTML file, with its pictures inside."""
    comparison, count = found.comparison, len(found.asked)
    order = found.by_difference()
    middle = max(SHOWN, (count - SHOWN) // 2)
    worst, median = order[:SHOWN], order[middle : middle + SHOWN]
    title = "Quantized FLUX.1 against BF16"
    body = (
        f"<h1>{title}</h1>"
        f"<p>{count} images of each model, {html.escape(_settings(found.described))}.</p>"
        f"<h2>Figures</h2><div class=wide>{figures(comparison)}</div><div class=wide>{differences(comparison)}</div>"
        f"{left_out(comparison)}"
        f"<h2>Beside what deepcompressor publishes</h2><div class=wide>{_table_beside(comparison)}</div>"
        f"<p><small>{html.escape(published.SOURCE)}, {published.COUNT} prompts</small></p>"
        f"<h3>What is alike</h3><div class=wide>{_table_alike(found.alike)}</div>"
        f"<h2>The largest differences</h2>{_rows(found, worst)}"
        f"<h2>Median differences</h2>{_rows(found, median)}"
        f"<p><small>Chosen by {html.escape(found.metric.title)}, the mean over the models; the pictures are reduced to "
        f"{_SIDE} pixels and compressed as JPEG, the figures are of the whole ones.</small></p>"
        f"<h2>What the figures mean</h2>{meanings(comparison)}<p>{_METHOD}</p>"
    )
    text = page("benchmarks/flux_dev.py", title, body, style=_PHONE)
    saved(path, functools.partial(Path.write_text, data=text, encoding="utf-8", newline="\n"))


def _settings(described: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in described["settings"].items())


def _table_beside(comparison: Comparison) -> str:
    return _html_table(["", *_COLUMNS.values(), "FID"], _beside(comparison))


def _table_alike(alike: Sequence[Likeness]) -> str:
    words = {True: "yes", False: "no", None: "cannot be said"}
    return _html_table(
        ["", "published", "here", "alike"], [[one.what, one.theirs, one.ours, words[one.alike]] for one in alike]
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        f"<tr><th>{html.escape(first)}</th>{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    ]
    return f"<table><tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>{''.join(lines)}</table>"


def _rows(found: Found, images: Sequence[int]) -> str:
    return "".join(_row(found, image) for image in images) or "<p>There are no more prompts.</p>"


def _row(found: Found, image: int) -> str:
    """Return one prompt's pictures side by side, each with its figures."""
    asked, values = found.asked[image], found._values(image)
    metrics = [metric for metric in found.comparison.metrics if metric.key in ("psnr_db", "lpips")]
    pictures = []
    for album in found.albums:
        said = [
            f"{metric.title} {values[album.label][metric.key]:{metric.form}} {metric.unit}".rstrip()
            for metric in metrics
            if album.label in values
        ]
        caption = html.escape(", ".join([album.label, *said]))
        pictures.append(f"<div><img alt='' src='{_embedded(album.picture(asked))}'><small>{caption}</small></div>")
    return f"<p>{html.escape(asked.prompt)} <small>seed {asked.seed}</small></p><figure>{''.join(pictures)}</figure>"


def _embedded(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    small.save(data, format="JPEG", quality=_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
