"""Names in a graph: what to call a node in a message, and which names are still free."""

from __future__ import annotations

import itertools

import onnx_ir as ir

__all__ = ["FreeNames", "name_of"]


def name_of(node: ir.Node) -> str:
    """Return a node's name, or that of its first output where it has none."""
    return node.name or (f"(node of {node.outputs[0].name})" if node.outputs else f"({node.op_type})")


class FreeNames:
    """The names that no tensor of a graph has, its subgraphs' tensors counted."""

    def __init__(self, graph: ir.Graph) -> None:
        outputs = (value for node in graph.all_nodes() for value in node.outputs)
        graphs = (graph, *graph.subgraphs())
        stored = (value for inner in graphs for value in (*inner.inputs, *inner.initializers.values()))
        self._taken = {str(value.name) for value in (*outputs, *stored)}

    def take(self, name: str) -> str:
        """Return the name, or the first of ``NAME_1``, ``NAME_2``... that is free; it is taken from then on."""
        numbered = (f"{name}_{count}" for count in itertools.count(1))
        free = name if name not in self._taken else next(other for other in numbered if other not in self._taken)
        self._taken.add(free)
        return free

    def give_back(self, name: str) -> None:
        """Make a name free again."""
        self._taken.discard(name)
