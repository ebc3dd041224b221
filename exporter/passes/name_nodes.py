"""Name every node and tensor after the module that it came from."""

from __future__ import annotations

import ast
from typing import Final

import onnx_ir as ir

__all__ = ["SCOPES", "module_path", "name_nodes"]

SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata: the module paths that it was traced in, outermost first, and then itself."""


def name_nodes(model: ir.Model) -> None:
    """Rename in place, and drop the tracer's notes, which hold paths of this machine.

    1. A node is called ``module path/OpType``, so that a linear's product is ``transformer_blocks.0.attn.to_q/MatMul``
       and a profile of the engine can be read; a second one of that name gets ``_1``.
    2. A node that another pass named after a module keeps its name.
    3. A constant is called ``constants/N``; a weight, which has no value yet, keeps its state-dict name.
    4. A tensor is called after its node: ``NODE_output_0``. Inputs, outputs and initializers keep theirs.
    """
    graph = model.graph
    interface = {id(value) for value in graph.outputs}
    taken: dict[str, int] = {}
    for node in graph:
        if node.name is None or "/" not in node.name:
            node.name = _unique(f"{module_path(node)}/{node.op_type}", taken)
            for index, output in enumerate(node.outputs):
                if id(output) not in interface:
                    output.name = f"{node.name}_output_{index}"
        node.metadata_props.clear()
        node.doc_string = None
    constants = [value for value in graph.initializers.values() if value.const_value is not None]
    for index, value in enumerate(constants):
        _rename_initializer(graph, value, f"constants/{index}")
    for value in [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]:
        value.metadata_props.clear()
        value.doc_string = None


def module_path(node: ir.Node) -> str:
    """Return the path of the innermost module that the node was traced in; the last scope is the operation itself."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['', '']"))
    return str(scopes[-2]) if len(scopes) > 1 and scopes[-2] else "model"


def _unique(name: str, taken: dict[str, int]) -> str:
    count = taken.get(name, 0)
    taken[name] = count + 1
    return name if count == 0 else f"{name}_{count}"


def _rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    assert value.name is not None
    del graph.initializers[value.name]
    value.name = name
    graph.initializers[name] = value
