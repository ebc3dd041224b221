"""What a build must know of an ONNX graph: inputs, promises, formats, external bytes. No weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from fp4trt.checkpoint_manifest import CheckpointManifest, read_checkpoint_manifest
from fp4trt.errors import BadGraph, BadModelError, UnknownArtifact
from fp4trt.file_kind import what_it_lacks
from fp4trt.json_file import object_of
from fp4trt.number_formats import FORMATS, FP8, NVFP4
from fp4trt.pipeline_folder import graph_in
from onnx_functions.graph.attentions import Attention, find_attentions, promised_attentions
from onnx_functions.graph.bodies import bodies_of
from onnx_functions.graph.branches import BRANCH_ADD, is_factor
from onnx_functions.graph.checkpoint_beside import checkpoint_beside
from onnx_functions.graph.external_data import Span, load_graph, span_of
from onnx_functions.graph.index import PRODUCTS, Index
from onnx_functions.graph.linears import (
    FP8_QUANTIZER,
    QUANTIZER,
    declared,
    declared_slots,
    declared_symbols,
    gives_fp8,
    metadata_of,
    promised_linears,
)
from onnx_functions.graph.lora_slots import Slots, is_factor_input
from onnx_functions.linting import require_form
from trt_build.profiles import InputShape
from trt_build.signature import Signature, dimension_of, signature_of

__all__ = ["Graph", "read_graph", "tensors_of"]


@dataclass(frozen=True)
class Graph:
    """A deployable ONNX graph without its external data."""

    path: Path
    model: onnx.ModelProto

    @cached_property
    def metadata(self) -> dict[str, str]:
        """The model's metadata_props."""
        return metadata_of(self.model)

    @cached_property
    def index(self) -> Index:
        """The index over nodes and tensors."""
        return Index(self.model)

    @cached_property
    def products(self) -> dict[str, onnx.NodeProto]:
        """Matrix products by the linear they belong to (the node's name without its "/MatMul"), branches apart."""
        branches = {*self.branch_products, *self.slot_products}
        nodes = (node for node in self.model.graph.node if node.op_type in PRODUCTS)
        return {_linear_of(node.name): node for node in nodes if node.name and node.name not in branches}

    @cached_property
    def branch_products(self) -> tuple[str, ...]:
        """Names of the products by the low-rank factors of SVDQuant."""
        return tuple(node.name for node, factor in self._factors if is_factor(factor))

    @cached_property
    def slot_products(self) -> tuple[str, ...]:
        """Names of the products by the factors of slots for LoRAs, which are inputs."""
        inputs = self.index.inputs
        return tuple(node.name for node, factor in self._factors if is_factor_input(factor) and factor in inputs)

    @property
    def slots(self) -> Slots | None:
        """What the metadata say of slots for LoRAs; None without any.

        Raises BadModelError where they cannot be read.
        """
        with _of_model(self.path):
            return declared_slots(self.model)

    @property
    def branched(self) -> tuple[str, ...]:
        """Linears that a low-rank branch is added to."""
        adds = (node.name for node in self.model.graph.node if node.name.endswith(BRANCH_ADD))
        return tuple(name.removesuffix(BRANCH_ADD) for name in adds)

    @cached_property
    def promised_fp4(self) -> tuple[str, ...]:
        """Linears that must run as FP4 GEMMs.

        All that anything says so of: the metadata, the checkpoint's manifest beside the graph, and each product whose
        weight is stored as FP4 codes. A graph without metadata that quantizes no activation is weight-only by its own
        pattern: then its stored codes promise nothing.
        """
        weights = self.fp4_weights if "fp4trt.linears" in self.metadata or self._quantizes_activations else ()
        promised = (*self._said(NVFP4.name), *weights)
        return tuple(dict.fromkeys(promised))

    @cached_property
    def promised_fp8(self) -> tuple[str, ...]:
        """Linears that must run as FP8 GEMMs: by the metadata, the manifest, and each weight stored in FP8.

        Without metadata those only whose activation is quantized to FP8 too; the others are weight-only.
        """
        declared = "fp4trt.linears" in self.metadata
        weights = (path for path in self.fp8_weights if declared or self._reads_fp8(self.products[path]))
        others = {path for kind in FORMATS if kind != FP8.name for path in self._said(kind)}
        promised = dict.fromkeys((*self._said(FP8.name), *weights))
        return tuple(path for path in promised if path not in {*self.promised_fp4, *others})

    @cached_property
    def promised(self) -> dict[str, tuple[str, ...]]:
        """Linears by the format in whose GEMMs they must run; NVFP4 and FP8 are always there."""
        others = {kind: self._said(kind) for kind in FORMATS if kind not in (NVFP4.name, FP8.name)}
        promised = {NVFP4.name: self.promised_fp4, FP8.name: self.promised_fp8}
        return promised | {kind: paths for kind, paths in others.items() if paths}

    @cached_property
    def fp4_weights(self) -> tuple[str, ...]:
        """Linears whose weight is stored as FP4 codes."""
        return self._with_weights(onnx.TensorProto.FLOAT4E2M1)

    @cached_property
    def fp8_weights(self) -> tuple[str, ...]:
        """Linears whose weight is stored in FP8."""
        return self._with_weights(onnx.TensorProto.FLOAT8E4M3FN)

    @cached_property
    def other_linears(self) -> tuple[str, ...]:
        """Linears that nothing promises in FP4 or FP8."""
        declared = (path for paths in self.declared_linears.values() for path in paths)
        constant = (path for path, node in self.products.items() if self.index.stored(node.input[1]) is not None)
        found = declared if "fp4trt.linears" in self.metadata else constant
        promised = {path for paths in self.promised.values() for path in paths}
        return tuple(path for path in dict.fromkeys(found) if path not in promised)

    @cached_property
    def declared_linears(self) -> dict[str, list[str]]:
        """The metadata's linears by format; empty for a third-party graph.

        Raises BadModelError where they cannot be read.
        """
        if "fp4trt.linears" not in self.metadata:
            return {}
        with _of_model(self.path):
            return promised_linears(self.model)

    @property
    def symbols(self) -> dict[str, dict[str, Any]]:
        """The metadata's symbolic dimensions; empty for a third-party graph.

        Raises BadModelError where they cannot be read.
        """
        with _of_model(self.path):
            return declared_symbols(self.model)

    def _said(self, kind: str) -> tuple[str, ...]:
        """Return the linears that the metadata, or the manifest beside the graph, say to be in a format."""
        manifest = self._manifest.quantized(kind) if self._manifest else ()
        return tuple(dict.fromkeys((*self.declared_linears.get(kind, ()), *manifest)))

    @property
    def described(self) -> dict[str, Any]:
        """Which model the metadata say it is: family, recipe and config; nothing for a graph that does not hold it.

        Raises BadModelError where they cannot be read.
        """
        if "fp4trt.config" not in self.metadata:
            return {}
        with _of_model(self.path):
            config = declared(self.model, "fp4trt.config", lambda value: object_of(value, "it"))
        names = {key: self.metadata.get(f"fp4trt.{key}") for key in ("family", "recipe")}
        return {**names, "config": config}

    @cached_property
    def attentions(self) -> dict[str, Attention]:
        """The attentions that are written out as two products, by module path."""
        return {attention.path: attention for attention in find_attentions(self.index)}

    @cached_property
    def promised_attentions(self) -> tuple[str, ...]:
        """Attentions that must run as one FP8 kernel each.

        All that anything says so of: the metadata, the manifest beside the graph, and each with all operands in FP8.
        """
        with _of_model(self.path):
            promised = promised_attentions(self.model)
        beside = self._manifest.fp8_attentions if self._manifest else ()
        written = (path for path, attention in self.attentions.items() if attention.in_fp8)
        return tuple(dict.fromkeys((*promised, *beside, *written)))

    @property
    def keys(self) -> tuple[tuple[str, ...], ...]:
        """Symbols that add up to the keys of an attention promised in FP8, of each that differs, the shortest first.

        Nothing where the graph does not say it of one, in declared symbols or a number.
        """
        shapes = {value.name: value.type.tensor_type.shape.dim for value in self.model.graph.value_info}
        promised = (self.attentions[path] for path in self.promised_attentions if path in self.attentions)
        found = (shapes.get(each.scores.output[0]) for each in promised)
        sizes = {dimension_of(shape[-1]) if shape else None for shape in found}
        sums = [tuple(size.split(" + ")) for size in sizes if isinstance(size, str)]
        known = None not in sizes and {name for names in sums for name in names} <= self.symbols.keys()
        return tuple(sorted(sums, key=lambda names: (len(names), names))) if known else ()

    @cached_property
    def _manifest(self) -> CheckpointManifest | None:
        with _of_model(self.path):
            return read_checkpoint_manifest(self.path.parent)

    @property
    def _quantizes_activations(self) -> bool:
        return any(node.op_type == QUANTIZER for node in self.model.graph.node)

    @property
    def uses_fp4(self) -> bool:
        """Whether any weight or activation is FP4, used for a GEMM or only stored: SM89 refuses both."""
        return any(tensor.data_type == onnx.TensorProto.FLOAT4E2M1 for tensor in self.model.graph.initializer) or (
            self._quantizes_activations
        )

    @cached_property
    def signature(self) -> Signature:
        """Its inputs and outputs."""
        return signature_of(self.model)

    @property
    def input_shapes(self) -> dict[str, InputShape]:
        """Dimensions of the inputs that are not initializers."""
        return {port.name: port.dims for port in self.signature.inputs}

    @cached_property
    def external_ranges(self) -> tuple[Span, ...]:
        """External byte ranges in graph order.

        Raises BadModelError where one leaves the model's folder, or a file is missing or too short.
        """
        with _of_model(self.path):
            spans = [span_of(tensor, self.path.parent) for tensor in tensors_of(self.model.graph)]
        return tuple(span for span in spans if span is not None)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph file and of all external data: what the builder has to hold."""
        return self.path.stat().st_size + sum(piece.length for piece in self.external_ranges)

    @cached_property
    def _factors(self) -> tuple[tuple[onnx.NodeProto, str], ...]:
        """Products, each with the tensor that it multiplies by."""
        nodes = (node for node in self.model.graph.node if node.op_type == "MatMul")
        return tuple((node, self.index.to_source(node.input[1])) for node in nodes)

    def _with_weights(self, data_type: int) -> tuple[str, ...]:
        stored = ((path, self.index.stored(node.input[1])) for path, node in self.products.items())
        return tuple(path for path, weight in stored if weight is not None and weight.data_type == data_type)

    def _reads_fp8(self, product: onnx.NodeProto) -> bool:
        maker = self.index.producer.get(self.index.to_source(product.input[0]))
        return maker is not None and maker.op_type == FP8_QUANTIZER and gives_fp8(maker, self.index.constants)


def read_graph(path: Path) -> Graph:
    """Read `model.onnx`, or the one in a checkpoint directory, without its external data.

    Raises:
        BadModelError: no such file, or not an ONNX model.
        BadCheckpoint: the quantized checkpoint beside it has a tensor without a meaning, or lacks one.
    """
    if path.is_dir():
        path = graph_in(path)
        if not path.is_file():
            raise BadModelError(f"{path.parent} holds no model.onnx; write one with fp4trt export {path.parent}")
    if not path.is_file():
        raise BadModelError(f"{path} {what_it_lacks(path)}; give an ONNX file or a directory that holds model.onnx")
    try:
        model = load_graph(path)
        require_form(path, model)
        checkpoint_beside(path, model)  # before its bytes are looked for: they may be those of another checkpoint
        return Graph(path, model)
    except BadGraph as error:
        raise BadModelError(str(error)) from None


@contextmanager
def _of_model(path: Path) -> Iterator[None]:
    """Say of which model it is that something cannot be read."""
    try:
        yield
    except (BadGraph, UnknownArtifact) as error:
        raise BadModelError(f"{path}: {error}") from None


def _linear_of(node_name: str) -> str:
    path, _, operator = node_name.rpartition("/")
    return path if operator in PRODUCTS else node_name


def tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a graph, or a body in it, stores: initializers and attributes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for body in bodies_of(node):
            yield from tensors_of(body)
