"""The command of the built-in model: ``fp4trt demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["demo"]


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The folder to write.")
@click.option("--gpu", default="rtx5090", show_default=True, help="The GPU to build an engine for.")
@click.option("--images", default=500, show_default=True, type=click.IntRange(1), help="Digits to draw and compare.")
@click.option("--recipe", default="nvfp4-ptq", show_default=True, help="Of the artifact; others are compared with it.")
@click.option("--row", "rows", multiple=True, help="Recipe to compare too, preset or file; more than once for several.")
@click.option("--force", is_flag=True, help="Replace an earlier result.")
def demo(output: Path, gpu: str, images: int, recipe: str, rows: tuple[str, ...], force: bool) -> dict[str, Any]:
    """Walk the whole road on the built-in model: quantize, export, validate, build, and compare pictures.

    Needs no network and no GPU. Leaves the quantized checkpoint, model.onnx, the validation report, the engine and a
    picture of the digits (digits.png) in the folder. Compares the recipes that do not train; one that does takes
    minutes more. After a kill the same command resumes.

    \b
    Example:
      fp4trt demo -o build/demo
      fp4trt demo -o build/best --recipe nvfp4-quality
      fp4trt demo -o build/all --row nvfp4-quality-bias --row nvfp4-qat
    """
    from generation.demo.demo import demo as run
    from generation.demo.demo import table

    result = run(output, gpu, images, force, recipe, rows)
    click.echo("")
    click.echo(table(result))
    click.echo(f"\nall of it is in {output}; the image is {result['grid']}")
    return result
