"""``fp4trt export`` of a graph of other origin: its weights marked for FP4 become FP4."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from calibration.write import refuse_existing
from exporter.errors import BadGraph, NoPlaceholders, OutputExists
from exporter.external_weights import Chunks, data_file, folder_for, save_self_contained
from exporter.onnx_export import IR_VERSION, graph_path
from exporter.pack_weights import PackedWeight
from exporter.passes.double_dequantize import QuantizedWeight, double_dequantize
from exporter.passes.lift_weights import lift_weights
from exporter.passes.raise_opset import raise_opset
from exporter.passes.settle_activations import settle_activations
from exporter.trace import OPSET
from exporter.trt_ops import WEIGHT_PLACEHOLDER

__all__ = ["export_graph"]

_INLINE_BYTES: Final = 1024
"""Smaller tensors stay in the graph, where shape inference can read them."""

_CHUNK: Final = 1 << 22


def export_graph(source: str | Path, output: str | Path, force: bool = False) -> dict[str, Any]:
    """Replace the ``TRT_FP4QDQ`` placeholders of an ONNX graph by FP4 codes and scales.

    Global scales are each weight's own, as ModelOpt's exporter has them. Nodes and tensors of the graph keep their
    names, and its activations stay as they are: where they have no quantizers, none are put in.

    Args:
        source: the graph, of opset 17 to 23, with its external data beside it.
        output: the graph to write, or a folder for ``model.onnx``; its data go into one file beside it.
        force: replace an existing graph.

    Returns:
        What the command prints as JSON.

    Raises:
        NoPlaceholders: nothing in the graph is marked for FP4.
        BadGraph, OutputExists: naming what is wrong.
    """
    theirs, path = Path(source), graph_path(output)
    model = _load(theirs)
    files = _checked_files(model)
    for result in (path, data_file(path)):
        if result.resolve() in {theirs.resolve(), *files}:
            raise OutputExists(f"{result} is what the graph is read from; choose another --output")
    _refuse_hidden_placeholders(model)
    nodes, declared = len(model.graph), model.graph.opset_imports.get("")
    raise_opset(model, OPSET)
    lift_weights(model)
    _refuse_blocks_across_products(model.graph)
    weights = double_dequantize(model, {}, "float32")
    settle_activations(model)
    common.RemoveInitializersFromInputsPass()(model)
    model.ir_version = max(model.ir_version, IR_VERSION)
    contents = dict(_contents(model, weights))
    try:
        with folder_for(path):
            for result in (path, data_file(path)):
                refuse_existing(result, force)
            with click.progressbar(length=len(contents), label="exporting", file=sys.stderr) as bar:
                counted = {name: functools.partial(_counted, chunks, bar) for name, chunks in contents.items()}
                save_self_contained(model, counted, path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise BadGraph(f"{theirs} makes no valid ONNX graph ({reason}); export it again") from None
    return {
        "onnx": str(path.resolve()),
        "opset": OPSET,
        "declared_opset": declared,
        "nodes": len(model.graph),
        "nodes_before": nodes,
        "quantized_weights": [weight.codes for weight in weights],
        "activation_quantizers": sum(node.op_type == "TRT_FP4DynamicQuantize" for node in model.graph),
        "onnx_bytes": path.stat().st_size,
        "data_bytes": data_file(path).stat().st_size,
    }


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise BadGraph(f"{path} does not exist; expected an ONNX file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many types, by version
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadGraph(f"{path} is not an ONNX model ({reason}); export it again") from None
    if not len(model.graph):
        raise BadGraph(f"{path} is not an ONNX model: it has no node; export it again")
    return model


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every tensor that a model stores, those of its subgraphs and functions too."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
    nodes = [*model.graph.all_nodes(), *(node for inner in model.functions.values() for node in inner.all_nodes())]
    for node in nodes:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()


def _checked_files(model: ir.Model) -> set[Path]:
    """Return the files of a model's external data, having checked that they hold it.

    Raises:
        BadGraph: naming the tensor whose bytes are missing.
    """
    files = set()
    for tensor in _tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file, begin, length = Path(tensor.path), tensor.offset or 0, tensor.length or tensor.nbytes
        if not file.resolve().is_relative_to(Path(tensor.base_dir).resolve()):
            raise BadGraph(f"{tensor.name} lies at {tensor.location}; expected a path inside the graph's folder")
        size = file.stat().st_size if file.is_file() else None
        if size is None or begin + length > size or length != tensor.nbytes:
            found = "does not exist" if size is None else f"has {size} bytes"
            raise BadGraph(
                f"{tensor.name} needs {tensor.nbytes} bytes from byte {begin} of {file}, which {found}; "
                "copy the graph again with its data"
            )
        files.add(file.resolve())
    return files


def _refuse_hidden_placeholders(model: ir.Model) -> None:
    """Refuse a graph without placeholders, or with some where they cannot be replaced."""
    found = [node for node in model.graph.all_nodes() if node.op_type == WEIGHT_PLACEHOLDER]
    inner = [node for node in found if node.graph is not model.graph]
    inner += [node for f in model.functions.values() for node in f.all_nodes() if node.op_type == WEIGHT_PLACEHOLDER]
    if inner:
        raise BadGraph(f"{inner[0].name} marks a weight inside a subgraph or function; inline it and export again")
    if not found:
        raise NoPlaceholders(
            f"the graph has no {WEIGHT_PLACEHOLDER} node, so no weight is marked for FP4; "
            "quantize the model with ModelOpt before its ONNX export"
        )
    if model.functions:
        raise BadGraph("the graph has local functions, which TensorRT cannot call twice; inline them and export again")


def _refuse_blocks_across_products(graph: ir.Graph) -> None:
    """Refuse a weight [K, N] that a product reads as it is: its blocks would run along N.

    TensorRT builds that without a word, in 16 bit.
    """
    for node in graph:
        if node.op_type != WEIGHT_PLACEHOLDER:
            continue
        for user, index in node.outputs[0].uses():
            turned = user.op_type == "Gemm" and "transB" in user.attributes and user.attributes["transB"].as_int()
            if user.op_type in ("MatMul", "Gemm") and index == 1 and not turned:
                raise BadGraph(
                    f"{user.name} reads the weight of {node.name} as [K, N], so its blocks lie across the sum and "
                    "TensorRT would drop FP4; mark the weight as [N, K] and transpose it afterwards"
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


def _counted(chunks: Chunks, bar: Any) -> Iterator[npt.NDArray[np.uint8]]:
    yield from chunks()
    bar.update(1)


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
