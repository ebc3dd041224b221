"""The `package` command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trt_build.packages.package import Packaged

__all__ = ["package_command"]

_EXAMPLE = """\b
Example:
  fp4trt package flux-fp4 --for rtx-demo -o demo_cache
  fp4trt package rtx5090.engine --for rtx-demo -o demo_cache
  fp4trt package flux-fp4 --for demo-diffusion
  fp4trt package flux-fp4 --for bfl -o FLUX.1-dev-onnx
  fp4trt package rtx5090.engine --for onnxruntime -o flux-ort
  fp4trt package flux-fp4 --for hub -o upload --base-model black-forest-labs/FLUX.1-schnell --license apache-2.0
"""


@click.command("package", epilog=_EXAMPLE, short_help="Lay a graph or engine out as another program reads it.")
@click.argument("artifact", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "program",
    type=click.Choice(["rtx-demo", "demo-diffusion", "bfl", "onnxruntime", "hub"]),
    required=True,
    help="The program: TensorRT-RTX's demo, TensorRT's demoDiffusion, Black Forest Labs' flux, ONNX Runtime with "
    "NVIDIA's provider for TensorRT-RTX, or the hub, for upload.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write; demo-diffusion needs none.")
@click.option(
    "--variant",
    type=click.Choice(["dev", "schnell", "kontext", "canny", "depth"]),
    help="Which FLUX.1 it is, where its inputs do not tell.  [default: what they tell; dev rather than kontext]",
)
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    help="The graph of an engine, or its folder.  [default: model.onnx beside it]",
)
@click.option("--base-model", metavar="OWNER/NAME", help="For hub: what was quantized.")
@click.option("--license", metavar="ID", help="For hub: its license, as the hub calls it.")
@click.option("--license-name", metavar="ID", help="For hub: what a license is called that is `other` there.")
@click.option("--link", is_flag=True, help="Give weights and engines a second name (hard link) in place of a copy.")
@click.option("--force", is_flag=True, help="Replace a package that is there.")
def package_command(artifact: Path, **options: Any) -> Packaged:
    """Lay ARTIFACT out as another program reads it, and say how that runs it.

    ARTIFACT is a graph or the folder with it, an engine with its JSON, or a quantized checkpoint. Before anything is
    written it is held against what the program gives and asks for: names, types, order and sizes of inputs and
    outputs.
    """
    from trt_build.packages.package import package

    result = package(artifact, **options)
    click.echo(_summary(result))
    for note in result.notes:
        click.echo(f"  {note}")
    click.echo(f"run {result.where}:\n{result.command}")
    return result


def _summary(result: Packaged) -> str:
    taken = f"{result.program} takes it as {result.model} ({result.precision})" if result.model else result.program
    if result.folder is None:
        return f"{taken}: used in its place, nothing was written"
    ways = Counter(file["how"] for file in result.files)
    how = ", ".join(f"{count} {way}" for way, count in ways.items())
    total = sum(file["bytes"] for file in result.files)
    return f"{taken}: {len(result.files)} files ({how}), {total:,} bytes -> {result.folder}"
