"""Reading a deployable graph: its linears, and the chains of dequantization that feed them.

Nothing here trusts names further than `X/MatMul` and `X/Add`: what a linear really reads is found by
following its inputs, so that a graph whose wires are crossed is read as crossed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import onnx
from onnx import NodeProto, TensorProto

from fp4trt.errors import BadGraph
from fp4trt.json_file import lists_of_strings, object_of, strings
from fp4trt.number_formats import FORMATS
from onnx_functions.graph.branches import Branch, find_branch, find_smoothing
from onnx_functions.graph.index import PRODUCTS, Index
from onnx_functions.graph.lora_slots import METADATA as LORA
from onnx_functions.graph.lora_slots import Slots, find_slot, slots_of
from onnx_functions.library import FP8_QUANTIZER, QUANTIZER

__all__ = [
    "FP8_QUANTIZER",
    "QUANTIZER",
    "Graph",
    "Linear",
    "Quantizer",
    "declared",
    "declared_groups",
    "declared_slots",
    "declared_symbols",
    "gives_fp8",
    "metadata_of",
    "promised_linears",
]

_T = TypeVar("_T")

_DEQUANTIZERS = {kind.dequantizer[1] for kind in FORMATS.values()}


@dataclass(frozen=True)
class Quantizer:
    """An activation quantizer and the tensors around it.

    Attributes:
        format: name of the number format.
        node: the node's name.
        input: the tensor [..., K] that it reads.
        scale: the scale of the whole tensor that it reads, "" in a format without one.
        codes: [..., K].
        block_scales: one for each block along K; None in a format without blocks.
    """

    format: str

    node: str
    input: str
    scale: str
    codes: str
    block_scales: str | None


@dataclass(frozen=True)
class Linear:
    """A linear layer of the graph.

    Attributes:
        path: module path, as the checkpoint names it.
        matmul: name of its MatMul (or Gemm) node.
        activation: the tensor that reaches the MatMul, after any dequantization.
        weight: the tensor [K, N] that reaches it.
        input: the tensor [..., K] before any smoothing and quantization.
        output: the tensor [..., N] after branch and bias, where there are any.
        add: name of the node that adds the bias, None without one.
        bias: the tensor that is added.
        quantizer: the activation quantizer, None in a 16-bit linear.
        weight_source: the initializer at the far end of the weight's chain: codes or a 16-bit weight.
        smoothing: the initializer that its input is multiplied by, None without one.
        smoother: name of the node that does that.
        branch: the low-rank branch that is added to the product, None without one.
        slot: the slot for a LoRA that is added behind it, None without one; it reads `input`.
    """

    path: str
    matmul: str
    activation: str
    weight: str
    input: str
    output: str
    add: str | None
    bias: str | None
    quantizer: Quantizer | None
    weight_source: str
    smoothing: str | None = None
    smoother: str | None = None
    branch: Branch | None = None
    slot: Branch | None = None

    @property
    def head(self) -> str:
        """The node that stands for the linear's beginning: its quantizer, or its product."""
        return self.quantizer.node if self.quantizer else self.matmul

    @property
    def entries(self) -> tuple[str, ...]:
        """The nodes that read its input."""
        slot = () if self.slot is None else (self.slot.products[0],)
        if self.smoother is not None:
            return (self.smoother, *slot)
        return (self.head, *slot) if self.branch is None else (self.head, self.branch.products[0], *slot)

    @property
    def computing(self) -> tuple[str, ...]:
        """The nodes that multiply and add, after any quantization."""
        beside = (each for each in (self.branch, self.slot) if each is not None)
        branches = (name for each in beside for name in (*each.products, each.add))
        return (self.matmul, *branches, *(() if self.add is None else (self.add,)))


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the model's metadata properties."""
    return {entry.key: entry.value for entry in model.metadata_props}


def promised_linears(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the linears that the exporter promised, by the name of the format, `bf16` without one.

    Raises:
        BadGraph: the graph carries no such promise, or one that cannot be read.
    """
    return declared(
        model,
        "fp4trt.linears",
        lambda value: {kind: list(strings(paths, repr(kind))) for kind, paths in object_of(value, "it").items()},
    )


def declared_groups(model: onnx.ModelProto) -> list[list[str]]:
    """Return the linears that share global scales, group by group; none for a graph that does not say.

    Raises:
        BadGraph: the metadata are no list of lists.
    """
    return declared(model, "fp4trt.groups", lambda value: [list(group) for group in lists_of_strings(value, "it")], [])


def declared_symbols(model: onnx.ModelProto) -> dict[str, dict[str, Any]]:
    """Return what the metadata say of each symbolic dimension; nothing for a third-party graph.

    Raises:
        BadGraph: they are no object of objects.
    """
    return declared(
        model,
        "fp4trt.symbols",
        lambda value: {name: object_of(symbol, repr(name)) for name, symbol in object_of(value, "it").items()},
        {},
    )


def declared_slots(model: onnx.ModelProto) -> Slots | None:
    """Return what the metadata say of slots for LoRAs; None for a graph without any.

    Raises:
        BadGraph: they cannot be read.
    """
    return declared(model, LORA, slots_of) if LORA in metadata_of(model) else None


def declared(model: onnx.ModelProto, key: str, read: Callable[[Any], _T], default: _T | None = None) -> _T:
    """Return what `read` makes of an entry of the metadata, which is JSON, or `default` where there is none.

    Raises:
        BadGraph: it cannot be read, or is missing without a default.
    """
    text = metadata_of(model).get(key)
    if text is None and default is not None:
        return default
    if text is None:
        raise BadGraph(f"the graph's metadata have no {key}; expected a graph of fp4trt export: export it again")
    try:
        return read(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise BadGraph(f"the graph's metadata {key} cannot be read ({error}); export the graph again") from None


class Graph(Index):
    """An index that knows the graph's linears."""

    def quantizer(self, tensor: str) -> Quantizer | None:
        """Return the activation quantizer whose dequantized codes `tensor` is, None where there is none."""
        node = self.producer.get(self.to_source(tensor))
        kind = None if node is None else self.quantizes_to(node)
        if node is None or kind is None:
            return None
        scale = node.input[1] if FORMATS[kind].needs_input_amax else ""
        block_scales = node.output[1] if FORMATS[kind].block is not None else None
        return Quantizer(kind, node.name, node.input[0], scale, node.output[0], block_scales)

    def quantizes_to(self, node: NodeProto) -> str | None:
        """Return the format that a node quantizes activations to, None where it does not."""
        for name, kind in FORMATS.items():
            if (node.domain, node.op_type) == kind.quantizer and (node.domain or gives_fp8(node, self.constants)):
                return name
        return None

    def weight_format(self, tensor: str) -> str | None:
        """Return the format of the codes that a weight is dequantized from, None for one that is not quantized."""
        stored = self.stored(tensor)
        if stored is None:
            return None
        codes = TensorProto.DataType.Name(stored.data_type)
        passed = {(node.domain, node.op_type) for node in self.chain(tensor)}
        found = (name for name, kind in FORMATS.items() if codes == kind.onnx_codes and kind.dequantizer in passed)
        return next(found, None)

    def linear(self, path: str) -> Linear:
        """Return the linear of a module path.

        Raises:
            BadGraph: there is no `path/MatMul`, or it reads no initializer as its weight.
        """
        node = self.nodes.get(f"{path}/MatMul") or self.nodes.get(f"{path}/Gemm")
        if node is None:
            raise BadGraph(f"the graph has no node {path}/MatMul, which its metadata promises; export it again")
        if node.op_type not in PRODUCTS or len(node.input) < 2:
            raise BadGraph(f"node {node.name} is a {node.op_type}; expected the product of {path}: export it again")
        activation, weight = node.input[0], node.input[1]
        source = self.to_source(weight)
        if source not in self.constants:
            raise BadGraph(f"node {node.name} reads {weight} as its weight, which comes from no initializer")
        branch = find_branch(self, path, node)
        product = branch.output if branch else node.output[0]
        slot = find_slot(self, path, product)
        product = slot.output if slot else product
        add = self._bias_add(path, product)
        bias = node.input[2] if len(node.input) > 2 else None
        if add is not None:
            bias = next(name for name in add.input if name != product)
        quantizer = self.quantizer(activation)
        enters = quantizer.input if quantizer else activation
        smoother = find_smoothing(self, enters)
        if branch is not None and branch.input != enters:
            raise BadGraph(f"node {branch.products[0]} reads {branch.input}, the quantizer of {path} {enters}")
        read = smoother.input[0] if smoother is not None else enters
        if slot is not None and slot.input != read:
            raise BadGraph(f"node {slot.products[0]} reads {slot.input}, and {path} reads {read}; export it again")
        return Linear(
            path,
            node.name,
            activation,
            weight,
            read,
            add.output[0] if add is not None else product,
            add.name if add is not None else None,
            bias,
            quantizer,
            source,
            smoother.input[1] if smoother is not None else None,
            smoother.name if smoother is not None else None,
            branch,
            slot,
        )

    def weight_scale(self, linear: Linear) -> str:
        """Return the initializer that is the scale of a quantized linear's weight: the global one, or the only one.

        Raises:
            BadGraph: the weight is not dequantized so.
        """
        values = self.producer.get(self.through_moves(linear.weight))
        while values is not None and values.op_type in _DEQUANTIZERS:
            if scale := self.constant(values.input[1]):
                return scale
            values = self.producer.get(self.through_casts(values.input[1]))
        raise BadGraph(f"the weight of node {linear.matmul} is not dequantized by stored scales")

    def linears(self) -> Iterator[Linear]:
        """Yield every promised linear, the quantized first."""
        for paths in promised_linears(self.model).values():
            for path in paths:
                yield self.linear(path)

    def _bias_add(self, path: str, product: str) -> NodeProto | None:
        add = self.nodes.get(f"{path}/Add")
        return add if add is not None and product in add.input else None


def gives_fp8(quantizer: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Whether a QuantizeLinear gives E4M3, by its attribute or by the type of its zero point."""
    kind = next((attribute.i for attribute in quantizer.attribute if attribute.name == "output_dtype"), 0)
    zero = constants.get(quantizer.input[2]) if len(quantizer.input) > 2 else None
    return TensorProto.FLOAT8E4M3FN in (kind, zero.data_type if zero is not None else 0)
