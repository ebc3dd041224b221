"""What the rules look at: a graph, its FP4 chains, its promise, where its data lies and what that holds."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import NodeProto, TensorProto

from fp4trt.errors import UnknownArtifact
from fp4trt.number_formats import FORMATS, FP8, NVFP4, NumberFormat
from fp4trt.safetensors_file import StoredTensor, tensors_in_file
from onnx_functions.graph.baked import Baked, baked_sizes
from onnx_functions.graph.checkpoint_beside import CheckpointBeside, checkpoint_beside
from onnx_functions.graph.dependence import Dependence, dependences
from onnx_functions.graph.external_data import BadSpan, Span, nbytes_of, span_of
from onnx_functions.graph.index import MOVES, PRODUCTS, RESHAPES, Reader, exchanges_axes
from onnx_functions.graph.linears import FP8_QUANTIZER, QUANTIZER, Graph, gives_fp8, metadata_of
from onnx_functions.graph.lora_slots import FACTORS, slots_of
from onnx_functions.graph.lora_slots import METADATA as LORA
from onnx_functions.linting.shapes import Shapes
from onnx_functions.linting.values import Values, read_values

__all__ = [
    "ActivationChain",
    "FP8Product",
    "Product",
    "Subject",
    "WeightChain",
]


@dataclass(frozen=True)
class WeightChain:
    """An FP4 weight and its dequantization.

    Attributes:
        values: the DequantizeLinear that reads the codes.
        codes: the codes' initializer.
        scales: the DequantizeLinear that gives the block scales, None where they are stored in full.
        block_scales: their initializer, "" where they come from elsewhere.
        global_scale: the tensor that `scales` reads as its scale, "" without one.
    """

    values: NodeProto
    codes: str
    scales: NodeProto | None
    block_scales: str
    global_scale: str


@dataclass(frozen=True)
class ActivationChain:
    """An activation quantizer and the DequantizeLinear nodes that read its codes and its block scales."""

    quantizer: NodeProto
    values: tuple[NodeProto, ...]
    scales: tuple[NodeProto, ...]

    @property
    def scale(self) -> str:
        """The tensor that is its global scale."""
        return self.quantizer.input[1] if len(self.quantizer.input) > 1 else ""


@dataclass(frozen=True)
class Product(Reader):
    """What reads an FP4 weight at the end of its chain."""

    chain: WeightChain


@dataclass(frozen=True)
class FP8Product(Reader):
    """What reads an FP8 weight that `values` dequantizes under `scale`."""

    values: NodeProto
    codes: str
    scale: str


@dataclass(frozen=True)
class Subject:
    """One graph under the lint; everything else is found from it once, when a rule asks for it."""

    path: Path
    model: onnx.ModelProto

    @cached_property
    def graph(self) -> Graph:
        """The index over nodes and tensors."""
        return Graph(self.model)

    @property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers and the values of Constant nodes."""
        return self.graph.constants

    @cached_property
    def checkpoint(self) -> CheckpointBeside | None:
        """The quantized checkpoint that the graph points into, or lies beside."""
        return checkpoint_beside(self.path, self.model)

    @cached_property
    def spans(self) -> dict[str, Span | BadSpan | None]:
        """Where each constant lies, or what is wrong with that; None inside the model."""
        return {name: _span(tensor, self.path.parent) for name, tensor in self.constants.items()}

    @cached_property
    def headers(self) -> dict[Path, dict[str, StoredTensor] | None]:
        """What each safetensors file that a constant points into holds by its header; None where that is damaged."""
        files = {span.file for span in self.spans.values() if isinstance(span, Span)}
        return {file: _header(file) for file in sorted(files) if file.suffix.lower() == ".safetensors"}

    @cached_property
    def held(self) -> dict[Span, str]:
        """The tensors of those files by the bytes that they take."""
        return {
            Span(file, tensor.offset, tensor.nbytes): name
            for file, tensors in self.headers.items()
            for name, tensor in (tensors or {}).items()
            if tensor.nbytes
        }

    @cached_property
    def known(self) -> set[str]:
        """The names of all constants, and of all tensors that lie in the same safetensors files."""
        return {*self.constants, *(name for tensors in self.headers.values() for name in tensors or ())}

    def owner(self, constant: str) -> str:
        """Return the name that a safetensors file gives to a constant's bytes, the constant's own where none does."""
        span = self.spans.get(constant)
        return self.held.get(span, constant) if isinstance(span, Span) else constant

    @cached_property
    def values(self) -> dict[str, Values]:
        """What the constants that can be read hold. Every byte of a file is read at most once for it."""
        return read_values(self.constants, self.spans)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The model's metadata properties."""
        return metadata_of(self.model)

    @cached_property
    def shapes(self) -> Shapes:
        """The tensors' shapes, as far as the graph gives them."""
        return Shapes(self.graph)

    @cached_property
    def dependence(self) -> Dependence:
        """Which inputs the tensors depend on."""
        return dependences(self.model)

    @cached_property
    def baked(self) -> list[Baked]:
        """Where the graph does not follow the symbolic sizes of its inputs."""
        return baked_sizes(self.model, self.path.parent)

    @cached_property
    def has_fp4(self) -> bool:
        """Whether the graph holds an FP4 tensor or quantizer."""
        stored = (tensor.data_type for tensor in self.constants.values())
        return bool(self.weights or self.activations) or TensorProto.FLOAT4E2M1 in stored

    @property
    def promises(self) -> bool:
        """Whether the graph says of itself what fp4trt's do."""
        return any(key.startswith("fp4trt.") for key in self.metadata)

    @cached_property
    def promised(self) -> dict[str, list[str]]:
        """The promised linears by format; empty where there is no readable promise."""
        value = self.declared("fp4trt.linears")
        if not isinstance(value, dict):
            return {}
        return {str(key): [str(path) for path in paths] for key, paths in value.items() if isinstance(paths, list)}

    @cached_property
    def slot_inputs(self) -> frozenset[str]:
        """The inputs that are factors of declared slots for LoRAs."""
        try:
            groups = slots_of(self.declared(LORA)).groups
        except TypeError:
            return frozenset()
        read = {f"{path}.{FACTORS[1]}" for group in groups for path in group}
        return frozenset(read | {f"{group[0]}.{FACTORS[0]}" for group in groups if group})

    def declared(self, key: str) -> Any:
        """Return a metadata entry that holds JSON, None where it is missing or unreadable."""
        try:
            return json.loads(self.metadata[key])
        except (KeyError, ValueError, RecursionError):
            return None

    @cached_property
    def weights(self) -> tuple[WeightChain, ...]:
        """The FP4 weights: every DequantizeLinear of constant codes that are FP4 or have scales of scales."""
        nodes = (node for node in self.model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) > 1)
        return tuple(chain for node in nodes if (chain := self._weight_chain(node)))

    @cached_property
    def activations(self) -> tuple[ActivationChain, ...]:
        """The activation quantizers, in whatever domain they were put."""
        nodes = (node for node in self.model.graph.node if node.op_type == QUANTIZER and len(node.output) > 1)
        return tuple(
            ActivationChain(node, self._dequantizers(node.output[0]), self._dequantizers(node.output[1]))
            for node in nodes
        )

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """What reads the FP4 weights, cast and moved: a move that changes the last axis is such a reader too."""
        return tuple(
            Product(**vars(reader), chain=chain)
            for chain in self.weights
            for reader in self.graph.readers(chain.values.output[0], MOVES, self._changes_last_axis)
        )

    @cached_property
    def fp8_products(self) -> tuple[FP8Product, ...]:
        """What reads the FP8 weights; not the block scales of FP4, which dequantize codes."""
        nodes = (node for node in self.model.graph.node if node.op_type == "DequantizeLinear")
        weights = ((node, codes) for node in nodes if (codes := self.constant(node.input[0])))
        return tuple(
            FP8Product(**vars(reader), values=node, codes=codes, scale=node.input[1])
            for node, codes in weights
            if self.constants[codes].data_type == TensorProto.FLOAT8E4M3FN
            for reader in self.graph.readers(node.output[0], MOVES)
            if (reader.node.op_type, reader.index) != ("DequantizeLinear", 1)
        )

    @cached_property
    def fp8_quantizers(self) -> tuple[NodeProto, ...]:
        """The QuantizeLinear nodes that give FP8."""
        nodes = (node for node in self.model.graph.node if node.op_type == FP8_QUANTIZER)
        return tuple(node for node in nodes if gives_fp8(node, self.constants))

    @cached_property
    def quantized_products(self) -> tuple[tuple[NodeProto, NumberFormat, str], ...]:
        """What reads a quantized weight, the weight's format, and its codes."""
        found = [(product.node, FP8, product.codes) for product in self.fp8_products]
        found += [(product.node, NVFP4, product.chain.codes) for product in self.products]
        others = set(FORMATS) - {FP8.name, NVFP4.name}
        for node in self.model.graph.node if others else ():
            if node.op_type in PRODUCTS and len(node.input) > 1:
                kind = self.graph.weight_format(node.input[1])
                if kind in others:
                    found.append((node, FORMATS[kind], self.graph.to_source(node.input[1])))
        return tuple(found)

    def any_quantizer_of(self, tensor: str) -> NodeProto | None:
        """Return the activation quantizer, to any format, whose dequantized codes a tensor is; None without one."""
        node = self.graph.producer.get(self.graph.to_source(tensor))
        if node is not None and self.graph.quantizes_to(node) not in (None, FP8.name, NVFP4.name):
            return node
        return self.quantizer_of(tensor) or self.fp8_quantizer_of(tensor)

    def fp8_quantizer_of(self, tensor: str) -> NodeProto | None:
        """Return the QuantizeLinear to FP8 whose dequantized codes a tensor is, None where there is none."""
        node = self.graph.producer.get(self.graph.to_source(tensor))
        return node if node is not None and any(node is found for found in self.fp8_quantizers) else None

    def constant(self, tensor: str) -> str:
        """Return the constant that a tensor is, through Identity nodes; "" where it is none."""
        return self.graph.constant(tensor)

    def scalar(self, tensor: str) -> float | None:
        """Return the value of a constant of one element, None where it is none or cannot be read."""
        found = self.values.get(self.constant(tensor))
        return found.scalar if found else None

    def is_same_scale(self, one: str, other: str) -> bool:
        """Whether two tensors are one constant, or two of one equal element."""
        value = self.scalar(one)
        return self.constant(one) == self.constant(other) or (value is not None and value == self.scalar(other))

    def dims(self, tensor: str) -> tuple[int, ...]:
        """Return a constant's shape."""
        return tuple(self.constants[tensor].dims)

    def quantizer_of(self, tensor: str) -> NodeProto | None:
        """Return the activation quantizer whose dequantized codes a tensor is, None where there is none.

        None too where a move on the way changes the last axis: then FP4 is lost.
        """
        node = self.graph.producer.get(self.graph.to_source(tensor))
        if node is None or node.op_type != QUANTIZER:
            return None
        passed = self.graph.chain(tensor)
        broken = sum(map(exchanges_axes, passed)) % 2 or any(map(self._changes_last_axis, passed))
        return None if broken else node

    def _changes_last_axis(self, node: NodeProto) -> bool:
        """Whether a node gives a tensor another last axis, or one that is not known, in which blocks of FP4 break up.

        Source: measured; in FP8, with one scale for the whole tensor, nothing is lost.
        """
        if node.op_type not in RESHAPES:
            return False
        before, after = (self.shapes.of(name) for name in (node.input[0], node.output[0]))
        return not (before and after and before[-1] is not None and before[-1] == after[-1])

    def _weight_chain(self, node: NodeProto) -> WeightChain | None:
        codes = self.constant(node.input[0])
        if not codes:
            return None
        scales = self.graph.producer.get(self.graph.through_casts(node.input[1]))
        double = scales is not None and scales.op_type == "DequantizeLinear" and len(scales.input) > 1
        if self.constants[codes].data_type != TensorProto.FLOAT4E2M1 and not double:
            return None
        if double:
            assert scales is not None
            return WeightChain(node, codes, scales, self.constant(scales.input[0]), scales.input[1])
        return WeightChain(node, codes, None, self.constant(node.input[1]), "")

    def _dequantizers(self, tensor: str) -> tuple[NodeProto, ...]:
        return tuple(node for node in self.graph.consumers.get(tensor, ()) if node.op_type == "DequantizeLinear")


def _header(file: Path) -> dict[str, StoredTensor] | None:
    try:
        return tensors_in_file(file)
    except UnknownArtifact:
        return None


def _span(tensor: TensorProto, directory: Path) -> Span | BadSpan | None:
    try:
        span = span_of(tensor, directory)
        wanted = nbytes_of(tensor) if span is None and tensor.raw_data else 0
    except BadSpan as fault:
        return fault
    held, elements = len(tensor.raw_data), sum(len(getattr(tensor, field)) for field in _FIELDS)
    if span is not None and (held or elements):
        return BadSpan("length", f"initializer {tensor.name} has data in the graph besides that in {span.file.name}")
    if span is None and held and held != wanted:
        return BadSpan("length", f"initializer {tensor.name} holds {held} bytes, its shape needs {wanted}")
    if span is None and not held and not elements and math.prod(tensor.dims):
        return BadSpan("length", f"initializer {tensor.name} of the shape {list(tensor.dims)} holds no data")
    return span


_FIELDS: Final = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
"""Where a tensor of the graph may hold its elements, other than as bytes."""
