"""Whether a checkpoint that a user names as the reference has the sizes of the graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from fp4trt.errors import BadReference
from fp4trt.families import Family

__all__ = ["refuse_other_sizes"]


def refuse_other_sizes(graph: onnx.ModelProto, folder: Path, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse a reference with a linear of another size than the graph's, or with a block that the graph has not.

    Args:
        graph: without its external data.
        folder: the reference's, for the message.
        family: of the reference.
        config: of the reference.

    Raises:
        BadReference: naming the first.
    """
    held = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
    for path, shape in family.linears(dict(config)).items():
        found = held.get(f"{path}.weight")
        # A third party's graph may hold it transposed.
        if found is not None and list(shape) not in (found, found[::-1]):
            raise BadReference(
                f"{path}.weight is {list(shape)} in {folder} and {found} in the graph: it is a checkpoint of other "
                "sizes; give the graph's own checkpoint"
            )
    names = "\n".join((*held, *(node.name for node in graph.graph.node)))
    for block in family.blocks(dict(config)):
        if not re.search(rf"(?:^|[/.]){re.escape(block)}(?!\d)", names, re.MULTILINE):
            raise BadReference(
                f"{folder} has a {block}, of which the graph has nothing: it is a checkpoint of another depth; give "
                "the graph's own checkpoint"
            )
