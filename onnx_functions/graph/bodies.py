"""Whether the wires of a graph can be followed: no node reads, through others or at once, what it gives itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import AttributeProto, GraphProto, NodeProto

__all__ = ["bodies_of", "circle", "nodes_with_inner", "outer_reads"]


def circle(graph: GraphProto) -> list[str]:
    """Return the names of nodes that read each other in a circle, or one that reads itself; nothing without any.

    Bodies of If, Loop and Scan count: what they read outside, the node that holds them reads. Where two nodes give a
    tensor of one name, whatever reads it reads both, so that every way of following the wires ends where this finds
    nothing.
    """
    for node in graph.node:
        for body in bodies_of(node):
            if found := circle(body):
                return found
    return _circle(graph)


def outer_reads(node: NodeProto) -> Iterator[str]:
    """Yield what a node reads of the graph that it lies in: its inputs, and what its bodies read outside themselves."""
    yield from (name for name in node.input if name)
    for body in bodies_of(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own |= {name for inner in body.node for name in inner.output}
        yield from (name for inner in body.node for name in outer_reads(inner) if name not in own)
        yield from (value.name for value in body.output if value.name not in own)


def bodies_of(node: NodeProto) -> Iterator[GraphProto]:
    """Yield a node's own bodies."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def nodes_with_inner(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    """Yield nodes, and those of their bodies."""
    for node in nodes:
        yield node
        for body in bodies_of(node):
            yield from nodes_with_inner(body.node)


def _circle(graph: GraphProto) -> list[str]:
    makers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.output:
            if name:
                makers.setdefault(name, []).append(index)
    above = [sorted({maker for name in outer_reads(node) for maker in makers.get(name, ())}) for node in graph.node]
    if all(maker < index for index, found in enumerate(above) for maker in found):
        return []  # in order, as nearly every graph is
    done: set[int] = set()
    for start in range(len(above)):
        path: list[int] = []
        on_path: set[int] = set()
        waiting = [(start, False)]
        while waiting:
            index, left = waiting.pop()
            if left:
                done.add(path.pop())
                on_path.discard(index)
            elif index in on_path:
                return [_name(graph.node[i]) for i in path[path.index(index) :]]
            elif index not in done:
                path.append(index)
                on_path.add(index)
                waiting.append((index, True))
                waiting.extend((maker, False) for maker in above[index])
    return []


def _name(node: NodeProto) -> str:
    return node.name or next(iter(node.output), "") or node.op_type
