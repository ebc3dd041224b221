"""``fp4trt export`` of a third-party graph: its weights marked for FP4 become FP4."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from exporter.existing_results import MARK, refuse_existing_results
from exporter.external_weights import Chunks, data_file, folder_for, save_self_contained
from exporter.foreign_graph import (
    checked_files,
    load_foreign,
    refuse_blocks_across_products,
    refuse_untyped,
    refuse_what_stays,
)
from exporter.lint_gate import passed_lint
from exporter.onnx_export import IR_VERSION, graph_path
from exporter.pack_weights import PackedWeight
from exporter.passes.double_dequantize import QuantizedWeight, double_dequantize
from exporter.passes.lift_weights import lift_weights
from exporter.passes.raise_opset import raise_opset
from exporter.passes.settle_activations import settle_activations
from exporter.trace import OPSET
from exporter.trt_ops import QUANTIZER
from fp4trt.errors import BadGraph, OutputExists
from fp4trt.progress import Progress, tracking
from fp4trt.verb import Result, verb
from onnx_functions.graph.external_data import load_graph
from onnx_functions.linting import require_form

__all__ = ["export_graph"]

_INLINE_BYTES: Final = 1024
"""Smaller tensors stay in the graph, where shape inference can read them."""

_CHUNK: Final = 1 << 22


@dataclass(frozen=True, eq=False)
class ExportedGraph(Result):
    """What :func:`export_graph` wrote.

    Attributes:
        onnx: the graph's path.
        opset: its opset.
        declared_opset: that of the graph it was made of.
        nodes: number of its nodes.
        nodes_before: that of the graph it was made of.
        quantized_weights: names of the initializers that hold codes.
        activation_quantizers: how many there are.
        allowed: findings of the lint that were let pass, a line each.
        onnx_bytes: size of the graph.
        data_bytes: size of the file beside it.
    """

    onnx: str
    opset: int
    declared_opset: int | None
    nodes: int
    nodes_before: int
    quantized_weights: Sequence[str]
    activation_quantizers: int
    allowed: Sequence[str]
    onnx_bytes: int
    data_bytes: int


@verb
def export_graph(
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    allow_slow: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> ExportedGraph:
    """Replace the ``TRT_FP4QDQ`` placeholders of an ONNX graph by FP4 codes and scales.

    Global scales are each weight's own, as ModelOpt's exporter has them. Nodes and tensors of the graph keep their
    names, and its activations stay as they are: where they have no quantizers, none are put in.

    Args:
        source: the graph, of opset 17 to 23, with its external data beside it.
        output: the graph to write, or a folder for ``model.onnx``; its data go into one file beside it.
        force: replace an existing graph.
        allow_slow: let pass what the lint finds to lose FP4 speed only.
        progress: called with each step.

    Raises:
        NoPlaceholders: nothing in the graph is marked for FP4.
        BadGraph, OutputExists: naming what is wrong.
        LintError: the graph would not be built right; nothing is written.
    """
    theirs, path = Path(source), graph_path(output)
    model = load_foreign(theirs)
    files = checked_files(model)
    for result in (path, data_file(path)):
        if result.resolve() in {theirs.resolve(), *files}:
            raise OutputExists(f"{result} is what the graph is read from; choose another --output")
    refuse_what_stays(model)
    require_form(theirs, load_graph(theirs))
    refuse_untyped(model.graph)
    nodes, declared = len(model.graph), model.graph.opset_imports.get("")
    raise_opset(model, OPSET)
    lift_weights(model)
    if not allow_slow:
        refuse_blocks_across_products(model.graph)
    weights = double_dequantize(model, {}, "float32")
    settle_activations(model)
    common.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, IR_VERSION)
    model.metadata_props[MARK] = "packed"
    contents = dict(_contents(model, weights))
    try:
        with folder_for(path):
            refuse_existing_results(path, True, force)
            with tracking(len(contents), "exporting") as advance:
                counted = {name: functools.partial(_counted, chunks, advance) for name, chunks in contents.items()}
                accept = functools.partial(passed_lint, source=theirs, allow_slow=allow_slow)
                allowed = save_self_contained(model, counted, path, accept)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise BadGraph(f"{theirs} makes no valid ONNX graph ({reason}); export it again") from None
    return ExportedGraph(
        onnx=str(path.resolve()),
        opset=OPSET,
        declared_opset=declared,
        nodes=len(model.graph),
        nodes_before=nodes,
        quantized_weights=[weight.codes for weight in weights],
        activation_quantizers=sum(node.op_type == QUANTIZER for node in model.graph),
        allowed=allowed,
        onnx_bytes=path.stat().st_size,
        data_bytes=data_file(path).stat().st_size,
    )


def _contents(model: ir.Model, weights: Iterable[QuantizedWeight]) -> Iterator[tuple[str, Chunks]]:
    """Yield what goes into the data file, in its order: what stays as it is, then weight by weight codes and scales."""
    packed: dict[str, Chunks] = {}
    for weight in weights:
        assert weight.weight.const_value is not None
        packer = PackedWeight(str(weight.weight.name), weight.weight.const_value)
        scale = model.graph.initializers[weight.global_scale]
        scale.const_value = ir.LazyTensor(
            functools.partial(_scalar, packer), ir.DataType.FLOAT, ir.Shape(()), name=scale.name, cache=True
        )
        packed[weight.codes] = packer.codes
        packed[weight.block_scales] = packer.block_scales
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if (
            name not in packed
            and tensor is not None
            and (tensor.nbytes >= _INLINE_BYTES or isinstance(tensor, ir.ExternalTensor))
        ):
            value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
            yield name, functools.partial(_stored, tensor)
    yield from packed.items()


def _counted(chunks: Chunks, advance: Callable[[], None]) -> Iterator[npt.NDArray[np.uint8]]:
    yield from chunks()
    advance()


def _scalar(packer: PackedWeight) -> ir.TensorProtocol:
    return ir.tensor(packer.global_scale.numpy(), name=f"{packer.name} scale")


def _stored(tensor: ir.TensorProtocol) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield a stored tensor's bytes as they are."""
    if not isinstance(tensor, ir.ExternalTensor):
        yield np.frombuffer(tensor.tobytes(), np.uint8)
        return
    for begin in range(0, tensor.nbytes, _CHUNK):
        count = min(_CHUNK, tensor.nbytes - begin)
        yield np.fromfile(tensor.path, np.uint8, count, offset=(tensor.offset or 0) + begin)
