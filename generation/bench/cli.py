"""The command ``fp4trt bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["bench"]

_PEERS = ("bf16", "fp32", "compile", "nvfp4", "mxfp8")


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """Return the peers of a comma-separated list."""
    if value is None:
        return None
    names = () if value == "none" else tuple(name.strip() for name in value.split(","))
    for name in names:
        if name not in _PEERS:
            raise click.BadParameter(f"'{name}' is no peer; expected some of {', '.join(_PEERS)} with commas, or none")
    return names


@click.command()
@click.argument("artifact", metavar="ENGINE|MODEL.onnx|DIR", type=click.Path(path_type=Path))
@click.option("--reference", help="The plain checkpoint whose weights torch computes with.  [default: random weights]")
@click.option("--resolution", metavar="R", help="Pixels: 1024 or 768x1360.  [default: what the engine is best at]")
@click.option("--batch", metavar="N", help="Images.  [default: likewise]")
@click.option("--text", metavar="N", help="Text tokens.  [default: likewise]")
@click.option("--frames", metavar="N", help="Frames of a video.  [default: likewise]")
@click.option("--audio", metavar="N", help="Audio tokens.  [default: likewise]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: 20, on a CPU 4]")
@click.option(
    "--warmup", type=click.IntRange(1), default=2, show_default=True, help="Calls before those that are timed."
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="How often all steps are run.")
@click.option(
    "--peers",
    callback=_names,
    help=f"Models in torch to time besides: some of {', '.join(_PEERS)}, or none.  [default: all that make sense here]",
)
def bench(artifact: Path, **options: Any) -> Any:
    """Time an engine, per step and for all of a schedule, beside the same model in torch.

    Of a checkpoint's folder it is the engine for this machine's GPU. Without a GPU it is the graph, in ONNX Runtime,
    beside torch on the same CPU. Each runs in a process of its own, one after another; one that cannot run is listed
    with the reason.

    \b
    Example:
      fp4trt bench flux-fp4/rtx5090.engine --reference FLUX.1-dev --resolution 1024
      fp4trt bench digits-fp4 --repeats 10
    """
    from generation.bench.bench import bench as run

    result = run(artifact, **options)
    click.echo(result.table)
    return result
