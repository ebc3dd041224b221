"""The verb ``export`` of whatever the command takes: a checkpoint, or a third party's graph."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from exporter import onnx_export
from exporter.onnx_export import Exported, Precision
from exporter.passes.double_dequantize import ScaleDtype
from exporter.placeholders import ExportedGraph, export_graph
from fp4trt.errors import BadGraph
from fp4trt.options import at_least, one_of, takes
from fp4trt.progress import Progress
from fp4trt.single_files.opening import is_checkpoint
from fp4trt.verb import verb

__all__ = ["export"]


@verb
@takes(
    BadGraph,
    precision=one_of(*get_args(Precision)),
    scale_dtype=one_of(*get_args(ScaleDtype)),
    lora_rank=at_least(1),
)
def export(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    scale_dtype: ScaleDtype | None = None,
    copy_weights: bool = False,
    force: bool = False,
    precision: Precision = "nvfp4",
    lora_rank: int | None = None,
    component: str | None = None,
    allow_slow: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Exported | ExportedGraph:
    """Export a checkpoint, or the FP4 placeholders of a third party's graph, as an opset-23 graph for TensorRT.

    Args:
        directory: a checkpoint, as :func:`exporter.onnx_export.export` takes it, or an ONNX file, as
            :func:`exporter.placeholders.export_graph` does.
        output: the graph to write, or a folder for ``model.onnx``; of a checkpoint by default ``DIRECTORY/model.onnx``.
        scale_dtype, copy_weights, precision, lora_rank, component: of a checkpoint.
        force: replace an existing graph.
        allow_slow: of a graph, let pass what the lint finds to lose FP4 speed only.
        progress: called with each step.

    Raises:
        BadGraph: there is no such option for what is exported; and all that the two functions raise.
    """
    source = Path(directory)
    if is_checkpoint(source):
        if allow_slow:
            raise BadGraph(f"allow_slow is for a third-party graph, and {directory} is a checkpoint; leave it out")
        return onnx_export.export(
            directory,
            output,
            scale_dtype=scale_dtype,
            copy_weights=copy_weights,
            force=force,
            precision=precision,
            lora_rank=lora_rank,
            component=component,
        )
    of_checkpoints = {"scale_dtype": scale_dtype, "copy_weights": copy_weights, "precision": precision != "nvfp4"}
    for name, given in (*of_checkpoints.items(), ("lora_rank", lora_rank), ("component", component)):
        if given:
            raise BadGraph(f"{name} is for checkpoints, and {source} is a graph; leave it out")
    if output is None:
        raise BadGraph(f"{source} is a graph; name the one to write with output")
    return export_graph(source, output, force=force, allow_slow=allow_slow)
