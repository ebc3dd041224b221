"""The command ``fp4trt teacache``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["teacache"]

_PATH = click.Path(path_type=Path)


def _numbers(_: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Return the whole numbers of a comma-separated list."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"'{value}' is no list of whole numbers; expected such as {parameter.default}")
    return tuple(int(part) for part in parts)


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=_PATH, help="The YAML file to write.  [default: teacache.yaml beside the source]")
@click.option("--steps", type=click.IntRange(4), help="Denoising steps.  [default: the model's own]")
@click.option(
    "--skip",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.3,
    show_default=True,
    help="Share of the steps to leave out at least.",
)
@click.option(
    "--decider",
    type=click.Choice(["time", "latents", "modulated"]),
    default="time",
    show_default=True,
    help="What tells of a step before it is computed: the timestep's embedding, the noisy picture, or the first "
    "block's modulated input, as TeaCache has it.",
)
@click.option(
    "--reuse",
    type=click.Choice(["linear", "hold"]),
    default="linear",
    show_default=True,
    help="What stands for the velocity: the line through the last two computed ones, or the last one.",
)
@click.option("--degree", type=click.IntRange(1, 5), default=3, show_default=True, help="Of the polynomial.")
@click.option(
    "--first",
    default="1,2,3,4",
    show_default=True,
    callback=_numbers,
    help="Steps at the start always computed, to try.",
)
@click.option("--last", default="1,2", show_default=True, callback=_numbers, help="The same of the end.")
@click.option(
    "--candidates", "most", type=click.IntRange(1), default=60, show_default=True, help="To draw with at most."
)
@click.option("--seeds", default="0,1", show_default=True, callback=_numbers, help="Of the noise to fit on.")
@click.option("--images", type=click.IntRange(1), help="Of each seed.  [default: 20, or a pipeline's prompts]")
@click.option("--check-seeds", default="1000", show_default=True, callback=_numbers, help="Of the noise to measure on.")
@click.option("--check-images", type=click.IntRange(1), help="Of each.  [default: 100, or a pipeline's prompts]")
@click.option("--prompts", type=_PATH, help="A text file, one prompt a line.  [default: the model's own]")
@click.option(
    "--pictures", type=_PATH, metavar="FOLDER|FILE", help="What a pipeline reads beside the prompts, in turn."
)
@click.option("--resolution", type=click.IntRange(16), help="Pixels of a side.  [default: the pipeline's own]")
@click.option("--plot", type=_PATH, help="A file to draw the curve into: .html, .svg or .png.")
@click.option("--force", is_flag=True, help="Replace an earlier result.")
def teacache(source: str, output: Path | None, **options: Any) -> Any:
    """Find which denoising steps a model may leave out, and what that costs its pictures.

    SOURCE is a checkpoint, plain or quantized, "digits" for the built-in model, or a graph in its checkpoint's folder.
    A polynomial is fitted from what changes before a step to what the step changes; then thresholds are tried. The
    graph stays as it is: the loop around it leaves out the call, and goes on along the line of the last two.

    \b
    Example:
      fp4trt teacache digits --steps 28 -o teacache.yaml --plot teacache.html
      fp4trt teacache flux-fp4 --steps 50 --prompts prompts.txt --skip 0.32
    """
    from generation.step_caching.teacache import teacache as run

    result = run(source, output, **options)
    click.echo(result.table)
    click.echo(f"\nthe settings are in {result.settings}")
    if result.plot is not None:
        click.echo(f"the curve is in {result.plot}")
    return result
