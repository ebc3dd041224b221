"""The command of this room: ``fp4trt export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["export"]

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("directory", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="The graph to write.  [default: DIRECTORY/model.onnx]")
@click.option(
    "--scale-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the dequantized block scales; float32 equals fake quantization bit for bit.",
)
@click.option("--copy-weights", is_flag=True, help="Copy the weights beside the graph instead of pointing at them.")
@click.option("--force", is_flag=True, help="Replace an existing graph.")
def export(directory: Path, output: Path | None, scale_dtype: str, copy_weights: bool, force: bool) -> dict[str, Any]:
    """Export a quantized checkpoint as an opset-23 ONNX graph for TensorRT.

    The graph's initializers point into the checkpoint's safetensors: keep both in one folder.

    \b
    Example:
      fp4trt export flux-fp4
      fp4trt export flux-fp4 -o elsewhere/model.onnx --copy-weights
    """
    from exporter.onnx_export import export as run

    result = run(directory, output, scale_dtype, copy_weights, force)  # type: ignore[arg-type]
    if result["copied_weights"]:
        click.echo(f"weights are copied beside the graph: {result['copied_because']}")
    click.echo(
        f"exported {result['nodes']} nodes, {result['quantized_linears']} linears in NVFP4, "
        f"{result['onnx_bytes']:,} bytes -> {result['onnx']}"
    )
    return result
