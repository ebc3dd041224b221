"""Make what a weight's placeholder reads an initializer, however the exporter that wrote the graph stored it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from exporter.naming import FreeNames, name_of
from exporter.trt_ops import WEIGHT_PLACEHOLDER
from fp4trt.errors import BadGraph

__all__ = ["constant_to_initializer", "lift_weights"]

Move = tuple[Literal["Transpose"], tuple[int, ...]] | tuple[Literal["Cast"], ir.DataType]

_CARRIED_OUT: Final = ("Identity", "Transpose", "Cast")
"""The moves that are carried out on a stored weight, [N, K] or [K, N] before and behind; others are refused by name."""

_INLINE_BYTES: Final = 1024
"""Smaller constants stay nodes: shapes and the like."""


def lift_weights(model: ir.Model) -> None:
    """Rewrite in place.

    1. A constant of 1 KiB or more, or one whose bytes lie in another file, becomes an initializer of its tensor's name.
    2. A placeholder that reads an initializer through Identity, Transpose or Cast reads a new initializer with the same
       values, computed when they are asked for; so ``Cast(FP16 weight)`` is packed as what the Cast gives.

    Placeholders that read the same thing in the same way read one initializer afterwards.

    Raises:
        BadGraph: a Transpose on the way has other axes than what it reads.
    """
    for node in list(model.graph):
        if node.op_type == "Constant" and node.domain == "":
            _lift_constant(model.graph, node)
    made: dict[tuple[str, tuple[Move, ...]], ir.Value] = {}
    names = FreeNames(model.graph)
    for node in list(model.graph):
        if node.op_type == WEIGHT_PLACEHOLDER:
            _lift_moved(model.graph, node, made, names)


def _lift_constant(graph: ir.Graph, node: ir.Node) -> None:
    attribute = node.attributes.get("value")
    tensor = attribute.as_tensor() if attribute is not None else None
    read_by_placeholder = any(user.op_type == WEIGHT_PLACEHOLDER for user, _ in node.outputs[0].uses())
    if tensor is None or not (
        read_by_placeholder or tensor.nbytes >= _INLINE_BYTES or isinstance(tensor, ir.ExternalTensor)
    ):
        return
    if not node.outputs[0].is_graph_output():
        constant_to_initializer(graph, node, tensor)


def constant_to_initializer(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    """Put an initializer of its name in the place of a Constant's output, which is not an output of the graph."""
    old = node.outputs[0]
    value = ir.Value(
        name=old.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)


def _lift_moved(
    graph: ir.Graph, node: ir.Node, made: dict[tuple[str, tuple[Move, ...]], ir.Value], names: FreeNames
) -> None:
    """Apply rule 2 to one placeholder; one that reads an initializer, or something computed, stays as it is."""
    read = node.inputs[0] if node.inputs else None
    source, moves = _origin(read)
    if read is None or source is None or source.const_value is None or source is read:
        return
    key = (str(source.name), moves)
    if not moves:
        made[key] = source
    if key not in made:
        made[key] = _moved(graph, source.const_value, moves, names.take(f"{read.name}_moved"))
    node.replace_input_with(0, made[key])
    _remove_orphans(graph, read)


def _origin(value: ir.Value | None) -> tuple[ir.Value | None, tuple[Move, ...]]:
    """Return the initializer that a value is a moved form of, or None, and the moves in the order they are made."""
    movers: list[ir.Node] = []
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _CARRIED_OUT:
            return None, ()
        movers.insert(0, node)
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return None, ()
    rank = len(value.const_value.shape.numpy())
    return value, tuple(_move(node, rank) for node in movers if node.op_type != "Identity")


def _move(node: ir.Node, rank: int) -> Move:
    if node.op_type == "Cast":
        return ("Cast", ir.DataType(node.attributes["to"].as_int()))
    perm = node.attributes.get("perm")
    axes = tuple(perm.as_ints() if perm else reversed(range(rank)))
    if sorted(axes) != list(range(rank)):
        raise BadGraph(f"{name_of(node)} has perm {list(axes)}, for a weight of {rank} axes; export the graph again")
    return ("Transpose", axes)


def _moved(graph: ir.Graph, stored: ir.TensorProtocol, moves: Sequence[Move], name: str) -> ir.Value:
    """Register an initializer whose values are those of a stored tensor after some moves."""
    shape, dtype = [int(size) for size in stored.shape.numpy()], stored.dtype
    for move in moves:
        if move[0] == "Transpose":
            shape = [shape[axis] for axis in move[1]]
        else:
            dtype = move[1]

    def values() -> ir.TensorProtocol:
        array: npt.NDArray[Any] = stored.numpy()
        with np.errstate(over="ignore"):  # what becomes infinite is refused by name when it is packed
            for move in moves:
                array = np.transpose(array, move[1]) if move[0] == "Transpose" else array.astype(move[1].numpy())
        return ir.Tensor(array, dtype=dtype, name=name)

    tensor = ir.LazyTensor(values, dtype, ir.Shape(shape), name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _remove_orphans(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what made a value that nobody reads any more."""
    while value is not None and not value.uses() and not value.is_graph_output():
        if value.is_initializer():
            graph.initializers.pop(str(value.name))
            return
        node = value.producer()
        if node is None:
            return
        value = node.inputs[0] if node.inputs else None
        graph.remove(node, safe=True)
