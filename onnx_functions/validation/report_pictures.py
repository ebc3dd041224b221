"""The parts of report.html that show outputs: the graph's beside the reference's, and their error by time."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.html_page import plot, scrolling
from fp4trt.html_pictures import Other, Pictured, data_uri, picture_section
from onnx_functions.validation.verdict import ByTime, OutputPicture

__all__ = ["by_time_part", "pictures_part"]

_TINY: Final = 128
"""Pixels of a side up to which pictures are enlarged as squares."""

_WHAT: Final = """
<p>What the graph gives for made-up inputs, beside what torch gives for the same: a diffusion transformer's velocity
in its latent space, <em>not an image</em>. Nothing can be recognized in it; all that matters is whether the two sides
are alike. Each token is a square of its channels; gray is 0, black and white are torch's largest value. Drag over a
picture, or use the arrow keys: torch is on the left of the line, the graph on the right.</p>
"""

_HOW: Final = """
<p>How far the graph's output is from torch's on the same made-up inputs at several times: 1 is pure noise, 0 a picture.
Against the quantized checkpoint the two differ where rounding makes a code fall the other way in one of them; against a
16-bit one this is the error of the quantization. No gate is on it: <em>end to end</em> decides.</p>
"""


def pictures_part(pictures: Sequence[OutputPicture]) -> str:
    """Return the pictures with their title; nothing where there is none."""
    if not pictures:
        return ""
    shown = [
        Pictured(
            each.caption,
            (each.reference.shape[1], each.reference.shape[0]),
            _png(each.reference),
            [Other(_png(each.graph), _png(each.difference), each.note)],
        )
        for each in pictures
    ]
    tiny = max(max(each.size) for each in shown) <= _TINY
    return f"<h2>Outputs</h2>{picture_section('torch', ['graph'], shown, tiny=tiny, key='outputs')}{_WHAT}"


def by_time_part(by_time: ByTime) -> str:
    """Return the plot of the error by time and its numbers, or why there are none."""
    if not by_time.points:
        told = f"<p>Left out: {html.escape(by_time.left_out)}.</p>"
        return f"<h2>Error by time</h2>{told}" if by_time.left_out else ""
    names = list(by_time.points[0][1])
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><th>{time:g}</th>{''.join(f'<td class=number>{errors[name]:.3g}</td>' for name in names)}</tr>"
        for time, errors in by_time.points
    )
    table = scrolling(f"<table><tr><th>Time</th>{head}</tr>{rows}</table>")
    return (
        f"<h2>Error by time</h2>{_HOW}{_plot(by_time, names)}<details><summary>The numbers</summary>{table}</details>"
    )


def _plot(by_time: ByTime, names: Sequence[str]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same figures give the same bytes; letters that a phone shows large enough.
    with mpl.rc_context({"svg.hashsalt": "fp4trt", "font.size": 12}):
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for name in names:
            # An infinite error cannot be drawn; the table has it.
            points = [(time, errors[name]) for time, errors in by_time.points if math.isfinite(errors[name])]
            axes.plot([time for time, _ in points], [error for _, error in points], "o-", label=name)
        axes.set_xlim(1.03, 0)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.set_xlabel("time: noise on the left, the picture on the right")
        axes.set_ylabel("relative L2 error")
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(frameon=False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    return plot(text.getvalue(), "Error of the output by time; the numbers follow")


def _png(pixels: npt.NDArray[np.uint8]) -> str:
    """Return a picture's pixels as the address of an image."""
    from matplotlib.image import imsave

    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    file = io.BytesIO()
    nothing: Any = {"Software": None}  # the same pixels give the same bytes
    imsave(file, rgb, format="png", origin="upper", metadata=nothing)
    return data_uri("png", file.getvalue())
