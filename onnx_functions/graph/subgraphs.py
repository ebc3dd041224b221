"""Lay the bodies of If, Loop and Scan into the graph that holds them, so that one walk over its nodes sees them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx import AttributeProto, GraphProto, NodeProto

__all__ = ["lay_open"]


def lay_open(graph: GraphProto) -> None:
    """Rewrite a graph in place into one that can be looked through, and no longer run.

    1. The nodes of a body follow the node that holds it, which loses the body; its initializers join the graph's.
    2. A tensor or node whose name is taken already, as in two branches of one If, is called
       ``HOLDER/ATTRIBUTE/NAME``; readers inside its body follow.
    """
    if any(True for node in graph.node for _ in _bodies(node)):
        _Laying(graph).run()


class _Laying:
    """One graph, and the names that its nodes and tensors have so far."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.nodes = {node.name for node in graph.node}
        self.tensors = {value.name for value in graph.input} | _own_names(graph)

    def run(self) -> None:
        laid = [inner for node in self.graph.node for inner in self._laid(node, {}, "")]
        del self.graph.node[:]
        self.graph.node.extend(laid)

    def _laid(self, node: NodeProto, names: Mapping[str, str], place: str) -> Iterator[NodeProto]:
        """Yield a node of the body `place` ("" for the graph), its tensors called by `names`, and what it holds."""
        bodies = list(_bodies(node))
        bare = NodeProto()
        bare.CopyFrom(node)
        bare.input[:] = [names.get(name, name) for name in node.input]
        bare.output[:] = [names.get(name, name) for name in node.output]
        kept = [entry for entry in bare.attribute if entry.type not in (AttributeProto.GRAPH, AttributeProto.GRAPHS)]
        if bodies:
            del bare.attribute[:]
            bare.attribute.extend(kept)
        if place and bare.name:
            bare.name = bare.name if bare.name not in self.nodes else f"{place}/{bare.name.lstrip('/')}"
            self.nodes.add(bare.name)
        yield bare
        for what, body in bodies:
            yield from self._laid_body(f"{bare.name or bare.output[0]}/{what}", body, names)

    def _laid_body(self, place: str, body: GraphProto, outer: Mapping[str, str]) -> Iterator[NodeProto]:
        own = {value.name for value in body.input} | _own_names(body)
        names = {**outer, **{name: f"{place}/{name}" if name in self.tensors else name for name in own}}
        self.tensors |= {names[name] for name in own}
        for tensor in body.initializer:
            added = self.graph.initializer.add()
            added.CopyFrom(tensor)
            added.name = names[tensor.name]
        for node in body.node:
            yield from self._laid(node, names, place)


def _own_names(graph: GraphProto) -> set[str]:
    made = {name for node in graph.node for name in node.output}
    return (made | {tensor.name for tensor in graph.initializer}) - {""}


def _bodies(node: NodeProto) -> Iterator[tuple[str, GraphProto]]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.name, attribute.g
        yield from ((attribute.name, graph) for graph in attribute.graphs)
