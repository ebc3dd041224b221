"""Which results of an earlier export a new one may replace."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx

from exporter.external_weights import data_file
from fp4trt.errors import BadGraph, OutputExists
from fp4trt.publish import refuse_existing
from onnx_functions.graph.external_data import load_graph

__all__ = ["MARK", "refuse_existing_results"]

MARK: Final = "fp4trt"
"""The metadata key that tells a third-party graph which fp4trt has written; ours have keys that begin with it."""


def refuse_existing_results(path: Path, with_data: bool, force: bool) -> None:
    """Refuse to replace a graph without ``force``, and its data even with it where they are not of a graph of ours.

    Args:
        path: the graph that is to be written.
        with_data: its data are to be written too, into ``NAME.onnx.data``.
        force: replace what fp4trt wrote.

    Raises:
        OutputExists: naming the file.
    """
    refuse_existing(path, force)
    if not with_data:
        return
    data = data_file(path)
    refuse_existing(data, force)
    if data.exists() and not _is_ours(path, data):
        raise OutputExists(
            f"{data} is not the data of a graph that fp4trt wrote, so --force does not replace it; move it, or choose "
            "another --output"
        )


def _is_ours(graph: Path, data: Path) -> bool:
    """Whether fp4trt wrote the graph, and data of it lie in that file."""
    try:
        model = load_graph(graph)
    except BadGraph:
        return False
    marked = any(entry.key == MARK or entry.key.startswith(f"{MARK}.") for entry in model.metadata_props)
    return marked and any(_location(tensor) == data.name for tensor in model.graph.initializer)


def _location(tensor: onnx.TensorProto) -> str:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
