"""Is one block of the graph the reference's block? Its piece of the graph, in FP32, on the reference's own inputs.

What enters and leaves a block is not named in a graph. A tensor that nodes of the block make and others read is taken
for an output of the reference's block when it has that output's shape and comes nearest to its values; it is then held
against them, and the next block is fed with them. Behind a block that is left out it is recognised by the modules
that it depends on, as its counterpart in the last block that was checked. So a graph cannot pass by names alone: a
tensor that is fed is one that was found equal, and a block that takes something else from the block before is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx import TensorProto

from fp4trt.errors import BadGraph
from onnx_functions.graph.cut import cut
from onnx_functions.graph.element_types import element_types
from onnx_functions.graph.index import Index
from onnx_functions.graph.linears import Linear
from onnx_functions.validation.structure_gates import Run, Tap, output_key, structure_gate, taps_of
from onnx_functions.validation.teacher_gates import block_of
from onnx_functions.validation.verdict import FloatArray, Gate, relative_l2

__all__ = ["BlockStructure", "block_structure", "entering"]

_FLOATS = (TensorProto.FLOAT, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class BlockStructure:
    """One block's comparison.

    Attributes:
        gate: passed or not, naming the first tensor that diverges.
        errors: each linear's worst error.
        leaving: index of an output of the reference's block to the graph's tensor.
    """

    gate: Gate
    errors: Mapping[str, float] = field(default_factory=dict)
    leaving: Mapping[int, str] = field(default_factory=dict)


def block_structure(
    model: onnx.ModelProto,
    directory: Path,
    block: str,
    linears: Sequence[Linear],
    runs: Sequence[Run],
    limit: float,
    blocks: Collection[str],
) -> BlockStructure:
    """Compare the piece of the graph that is one block with the reference's block.

    Args:
        model: the deployable graph.
        directory: where its external data lie.
        block: its module path; empty for what lies outside the blocks.
        linears: in it.
        runs: the reference's block at each shape. `inputs` are the graph's inputs and the tensors that enter the block;
            `values` those of its modules and, by :func:`output_key`, of its outputs.
        limit: relative L2 of each tensor.
        blocks: all that there are.

    Raises:
        BadGraph, or what ONNX Runtime raises: the piece cannot be cut out or run.
    """
    index = Index(model)
    outputs = [] if block else [value.name for value in model.graph.output]
    candidates = _leaving(model, index, block, blocks) if block else []
    fed = runs[0].inputs
    taps = [tap.tensor for tap in taps_of(model, linears) if tap.tensor in index.producer and tap.tensor not in fed]
    piece = cut(model, {name: name for name in fed}, list(dict.fromkeys((*outputs, *candidates, *taps))))
    stray = _stray(piece, block, blocks)
    if stray:
        detail = f"{block or 'the end of the graph'} depends on {stray}: it takes from a block what that does not give"
        return BlockStructure(Gate("structure", False, float("inf"), limit, detail, (stray,)))
    leaving: dict[int, str] = {}

    def found_taps(found: Mapping[str, FloatArray], run: Run) -> list[Tap]:
        if not leaving:
            leaving.update(_nearest(found, run, block, candidates))
        return [Tap(name, f"output {place} of {block}", output_key(block, place)) for place, name in leaving.items()]

    gate, errors = structure_gate(piece, directory, linears, runs, limit, outputs, found_taps)
    return BlockStructure(gate, errors, leaving)


def entering(
    model: onnx.ModelProto, leaving: Mapping[int, str], checked: str, before: str, blocks: Collection[str]
) -> dict[int, str]:
    """Return the tensors that leave the block before, given those that leave the last block that was checked.

    The two are blocks of one stack, and what was found by its values in the one is found by its place in the other: it
    depends on the same modules of the block, and among several that do it is made as the same one of them. Names say
    nothing of it: what blocks share, as FLUX.2's modulation, lies in the first and shifts the numbers of its nodes.

    Raises:
        BadGraph: the block before is not of that form.
    """
    if before == checked:
        return dict(leaving)
    index = Index(model)
    places, others = (_by_modules(model, index, block, blocks) for block in (checked, before))
    names: dict[int, str] = {}
    for place, name in leaving.items():
        modules = next(modules for modules, tensors in places.items() if name in tensors)
        alike, found = places[modules], others.get(modules, [])
        if len(found) != len(alike):
            raise BadGraph(
                f"{len(found)} tensors leave {before} that depend on the modules which {name} of {checked} depends on, "
                f"expected {len(alike)}: the two are not the same block"
            )
        names[place] = found[alike.index(name)]
    return names


def _by_modules(
    model: onnx.ModelProto, index: Index, block: str, blocks: Collection[str]
) -> dict[frozenset[str], list[str]]:
    """Return the tensors that leave a block, in graph order, by the block's modules that they depend on."""
    found: dict[frozenset[str], list[str]] = {}
    for name in _leaving(model, index, block, blocks):
        found.setdefault(_modules_above(index, name, block), []).append(name)
    return found


def _modules_above(index: Index, tensor: str, block: str) -> frozenset[str]:
    """Return the paths within a block of the modules whose weight a tensor depends on."""
    read = {name for node in index.above(tensor) for name in node.input if name.startswith(f"{block}.")}
    weights = (name for name in read if name in index.initializers and name.endswith(".weight"))
    return frozenset(name.removeprefix(f"{block}.").removesuffix(".weight") for name in weights)


def _leaving(model: onnx.ModelProto, index: Index, block: str, blocks: Collection[str]) -> list[str]:
    """Return the floating-point tensors that the block's nodes make and other nodes read."""
    types = element_types(model)
    inside = [node for node in model.graph.node if _block(node, blocks) == block]
    made = [name for node in inside for name in node.output if types[name] in _FLOATS]
    return [name for name in made if any(_block(reader, blocks) != block for reader in index.consumers.get(name, ()))]


def _block(node: onnx.NodeProto, blocks: Collection[str]) -> str:
    return block_of(f"{node.name.rpartition('/')[0]}.", blocks)


def _stray(piece: onnx.ModelProto, block: str, blocks: Collection[str]) -> str | None:
    """Return a weight of another block that the piece reads."""
    matrices = (tensor.name for tensor in piece.graph.initializer if len(tensor.dims) == 2)
    return next((name for name in matrices if block_of(name, blocks) not in ("", block)), None)


def _nearest(found: Mapping[str, FloatArray], run: Run, block: str, candidates: Sequence[str]) -> Mapping[int, str]:
    """Return, for each output of the reference's block, the candidate of its shape that comes nearest to it.

    An output that nothing in the graph reads has none, as the last block's text stream.
    """
    nearest: dict[int, str] = {}
    places = (place for place in range(len(run.values)) if output_key(block, place) in run.values)
    for place in places:
        wanted = run.values[output_key(block, place)]
        fitting = [name for name in candidates if name in found and found[name].shape == wanted.shape]
        if fitting:
            errors = {name: relative_l2(found[name], wanted) for name in fitting}
            nearest[place] = min(errors, key=errors.__getitem__)
    return nearest
