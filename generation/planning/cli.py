"""The command ``fp4trt plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.source_options import LIKE

if TYPE_CHECKING:
    from generation.planning.result import Plan

__all__ = ["plan"]

_EXAMPLE = """\b
Example:
  fp4trt plan FLUX.1 --gpu rtx5070 --resolution 1024
  fp4trt plan black-forest-labs/FLUX.2-dev --gpu rtx5090 --recipe nvfp4-quality-r8 -o plan.html
"""


@click.command("plan", epilog=_EXAMPLE, short_help="Say what a model needs on a GPU, and whether it fits.")
@click.argument("source")
@click.option("--gpu", default="rtx5090", show_default=True, help="The GPU.")
@click.option("--resolution", metavar="R", help="Pixels: 1024 or 768x1360.  [default: the model's]")
@click.option("--batch", metavar="N", help="Images in a call.  [default: the model's]")
@click.option("--text", metavar="N", help="Text tokens.  [default: the model's]")
@click.option("--frames", metavar="N", help="Frames of a video.  [default: the model's]")
@click.option("--audio", metavar="N", help="Audio tokens.  [default: the model's]")
@click.option(
    "--reference-images", metavar="N", help="Pictures of that size that the model reads too.  [default: none]"
)
@click.option("--shape", "shapes", multiple=True, metavar="NAME=N", help="A symbolic dimension by its name.")
@click.option(
    "--recipe",
    multiple=True,
    metavar="NAME|FILE",
    help="A name of fp4trt recipes, or a YAML file, to plan for; more than once for several.  [default: one of each "
    "format]",
)
@LIKE
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="A picture besides, .html or .png; needs matplotlib."
)
@click.option("--force", is_flag=True, help="Replace a picture that is there.")
def plan(source: str, **options: Any) -> Plan:
    """Say what a model needs on a GPU before anything is quantized or built: memory by mode, disk, the least time.

    SOURCE is a checkpoint, plain or quantized, a pipeline's folder, a config.json, a single file, a name on the hub, or
    that of a published model, such as FLUX.1; no weights are read. The memory is a formula, checked against NVIDIA's
    table for FLUX.1-dev; the time is a roofline (docs/planning.md).
    """
    from generation.planning.plan import plan as make_plan
    from generation.planning.report import report_lines

    result = make_plan(source, **options)
    for line in report_lines(result):
        click.echo(line)
    if result.picture is not None:
        click.echo(f"picture: {result.picture}")
    return result
