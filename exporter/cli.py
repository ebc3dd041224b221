"""The command of this room: ``fp4trt export``, of a checkpoint or of a third-party graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from exporter.onnx_export import Exported
    from exporter.placeholders import ExportedGraph

__all__ = ["export"]

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="CHECKPOINT|THEIRS.onnx", type=_PATH)
@click.option("-o", "--output", type=_PATH, help="The graph to write, or its folder.  [default: CHECKPOINT/model.onnx]")
@click.option(
    "--precision",
    type=click.Choice(["nvfp4", "bf16"]),
    default="nvfp4",
    show_default=True,
    help="nvfp4 takes a quantized checkpoint, in whatever formats, bf16 a plain one (or `digits`).",
)
@click.option(
    "--scale-dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the dequantized block scales; float32 equals fake quantization bit for bit.  [default: float32]",
)
@click.option(
    "--lora-rank",
    type=click.IntRange(1),
    help="Give the linears slots for LoRAs of ranks up to this, as inputs of the graph (see fp4trt lora).",
)
@click.option(
    "--component",
    metavar="NAME",
    help="Of the folder of a whole pipeline, the part to export, in BF16: vae, text_encoder, text_encoder_2 ...",
)
@click.option("--copy-weights", is_flag=True, help="Copy the weights beside the graph instead of pointing at them.")
@click.option("--allow-slow", is_flag=True, help="For THEIRS.onnx: accept lint findings of severity slow.")
@click.option("--force", is_flag=True, help="Replace an existing graph.")
def export(
    source: Path,
    output: Path | None,
    precision: str,
    scale_dtype: str | None,
    lora_rank: int | None,
    component: str | None,
    copy_weights: bool,
    allow_slow: bool,
    force: bool,
) -> Exported | ExportedGraph:
    """Export a checkpoint, or a graph with FP4 placeholders, as an opset-23 ONNX graph for TensorRT.

    A checkpoint's graph points into its safetensors: keep both in one folder. THEIRS.onnx is a third-party
    graph, such as ModelOpt's, whose TRT_FP4QDQ nodes mark the weights for FP4; its names are kept, its data copied.

    \b
    Example:
      fp4trt export flux-fp4
      fp4trt export flux-fp4 -o elsewhere/model.onnx --copy-weights
      fp4trt export FLUX.1-dev --precision bf16 -o flux-bf16
      fp4trt export flux-fp4 --lora-rank 64
      fp4trt export FLUX.1-dev --component vae
      fp4trt export theirs.onnx -o ours
    """
    from fp4trt.errors import BadGraph
    from fp4trt.single_files.opening import is_checkpoint

    if not is_checkpoint(source):
        if (
            precision != "nvfp4"
            or copy_weights
            or any(each is not None for each in (scale_dtype, lora_rank, component))
        ):
            raise click.UsageError(
                "--precision, --scale-dtype, --lora-rank, --component and --copy-weights are for checkpoints, not for "
                "a graph"
            )
        if output is None:
            raise click.UsageError(f"{source} is a graph; name the one to write with --output")
        return _export_graph(source, output, force=force, allow_slow=allow_slow)
    if source.exists() and not source.is_dir():
        raise BadGraph(f"{source} is not a regular file; expected an ONNX file or a checkpoint's folder")
    if allow_slow:
        raise click.UsageError("--allow-slow is for a third-party graph, not for a checkpoint")
    options = {"scale_dtype": scale_dtype, "copy_weights": copy_weights, "force": force, "precision": precision}
    return _export_checkpoint(source, output, **options, lora_rank=lora_rank, component=component)


def _export_checkpoint(source: Path, output: Path | None, **options: Any) -> Exported:
    from exporter.onnx_export import export as run
    from fp4trt.number_formats import linears_in_words

    result = run(source, output, **options)
    if result.copied_weights:
        click.echo(f"weights are copied beside the graph: {result.copied_because}")
    linears = linears_in_words(result.formats) if result.formats else "all linears in BF16"
    click.echo(f"exported {result.nodes} nodes, {linears}, {result.onnx_bytes:,} bytes -> {result.onnx}")
    return result


def _export_graph(source: Path, output: Path, **options: Any) -> ExportedGraph:
    from exporter.placeholders import export_graph

    result = export_graph(source, output, **options)
    if result.declared_opset != result.opset:
        click.echo(f"raised opset {result.declared_opset} to {result.opset}: every operator means the same in both")
    for line in result.allowed:
        click.echo(f"allowed: {line}")
    quantizers = result.activation_quantizers
    click.echo(
        f"packed {len(result.quantized_weights)} weights to NVFP4; "
        + (f"{quantizers} activation quantizers kept" if quantizers else "no activation quantizers: weight-only")
    )
    total = result.onnx_bytes + result.data_bytes
    click.echo(f"exported {result.nodes} nodes, {total:,} bytes with their data -> {result.onnx}")
    return result
