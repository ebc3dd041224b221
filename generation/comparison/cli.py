"""The command ``fp4trt compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["compare"]

_PATH = click.Path(path_type=Path)


def _named(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, Path]:
    """Return name to checkpoint of ``NAME=CHECKPOINT`` arguments."""
    found: dict[str, Path] = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not (name and sign and path):
            raise click.BadParameter(
                f"'{value}' is not NAME=CHECKPOINT; name each checkpoint, such as ptq={value or 'DIR'}"
            )
        if name in found:
            raise click.BadParameter(f"the name '{name}' is given twice; give each checkpoint its own")
        found[name] = Path(path)
    return found


def _numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Return the whole numbers of a comma-separated list."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"'{value}' is not a list of seeds; expected whole numbers with commas: 1000,1001")
    return tuple(int(part) for part in parts)


@click.command()
@click.argument("source")
@click.argument("checkpoints", nargs=-1, required=True, callback=_named, metavar="NAME=CHECKPOINT...")
@click.option("-o", "--output", type=_PATH, required=True, help="The folder to write.")
@click.option("--seeds", default="1000,1001,1002", show_default=True, callback=_numbers, help="Of the starting noise.")
@click.option("--images", type=click.IntRange(1), help="Images of each seed.  [default: 500, or a pipeline's prompts]")
@click.option("--prompts", type=_PATH, help="A text file, one prompt a line.  [default: the model's own]")
@click.option(
    "--pictures",
    type=_PATH,
    metavar="FOLDER|FILE",
    help="What Kontext, Fill and Control read beside the prompts, in turn.",
)
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the model's own]")
@click.option("--resolution", type=click.IntRange(16), help="Pixels of a side.  [default: the pipeline's own]")
@click.option("--force", is_flag=True, help="Replace an earlier result.")
def compare(
    source: str,
    checkpoints: dict[str, Path],
    output: Path,
    seeds: tuple[int, ...],
    images: int | None,
    prompts: Path | None,
    pictures: Path | None,
    steps: int | None,
    resolution: int | None,
    force: bool,
) -> Any:
    """Draw the same images with a BF16 model and with its quantized checkpoints, and say how far apart they are.

    SOURCE is "digits" for the built-in model, a diffusers pipeline's folder, or a checkpoint with a sampling.json.
    Differences are relative to the first checkpoint, paired image by image. A command that was killed resumes after its
    last finished pair of checkpoint and seed.

    \b
    Example:
      fp4trt compare digits ptq=digits-ptq best=digits-best -o comparison
      fp4trt compare FLUX.1-dev ptq=flux-ptq svd=flux-svd -o comparison --prompts prompts.txt --resolution 1024
    """
    from generation.comparison.compare import compare as run

    result = run(
        source,
        checkpoints,
        output,
        seeds=seeds,
        images=images,
        prompts=prompts,
        pictures=pictures,
        steps=steps,
        resolution=resolution,
        force=force,
    )
    click.echo(result.table)
    click.echo(f"\nall of it is in {output}; open {result.report}")
    return result
