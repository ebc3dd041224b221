"""Rules for what a graph promises: its linears by format, and the inputs and outputs of its family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import TensorProto, ValueInfoProto

from fp4trt.families import family_named
from fp4trt.families.family import Size
from fp4trt.number_formats import FORMATS, NVFP4, NumberFormat
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import CASTS, PRODUCTS, name_of
from onnx_functions.linting.promised_tensors import product_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES", "Tensor", "contract_of"]


@dataclass(frozen=True)
class Tensor:
    """An input or output as its runtimes expect it; None is a size that belongs to the model."""

    name: str
    type: int
    shape: tuple[str | int | None, ...]
    optional: bool = False


def contract_of(family: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
    """Return a family's inputs and outputs, in order; None where there is no family of this name."""
    found = family_named(family)
    if found is None:
        return None
    types = {
        "bf16": TensorProto.BFLOAT16,
        "fp32": TensorProto.FLOAT,
        "bool": TensorProto.BOOL,
        "int32": TensorProto.INT32,
        "int64": TensorProto.INT64,
    }

    def own(size: Size | None) -> str | int | None:
        if isinstance(size, int):
            return size
        return size if isinstance(size, str) and size.rpartition("*")[2] in found.dims else None

    inputs = (
        Tensor(name, types[each.dtype], tuple(own(size) for size in each.shape), optional=each.given_by is not None)
        for name, each in found.inputs.items()
    )
    outputs = (Tensor(name, TensorProto.BFLOAT16, tuple(map(own, shape))) for name, shape in found.outputs.items())
    return tuple(inputs), tuple(outputs)


@rule("promised-linear", "wrong", "export again")
def promised_linear(subject: Subject) -> Iterator[Hit]:
    """A promised linear that the graph does not have under its name.

    Source: coverage and validation find linears by `LINEAR/MatMul`.
    """
    for paths in subject.promised.values():
        for path in paths:
            if product_of(subject, path) is None:
                yield Hit(f"the graph has no product of the promised linear {path}", f"{path}/MatMul")


@rule("promised-fp4", "slow", "quantize it again, or export again: the promise is in the metadata")
def promised_fp4(subject: Subject) -> Iterator[Hit]:
    """A linear that is promised in FP4 and whose weight is stored in 16 bit.

    Source: measured: built without a word.
    """
    yield from _in_another_format(subject, NVFP4)


@rule("promised-fp8", "slow", "quantize it again, or export again: the promise is in the metadata")
def promised_fp8(subject: Subject) -> Iterator[Hit]:
    """A linear that is promised in FP8, or in MXFP8, and whose weight is stored in 16 bit.

    Source: measured: built without a word.
    """
    for kind in FORMATS.values():
        if kind != NVFP4:
            yield from _in_another_format(subject, kind)


@rule("promised-sixteen-bit", "wrong", "export again: the promise is in the metadata")
def promised_sixteen_bit(subject: Subject) -> Iterator[Hit]:
    """A linear that is promised in 16 bit and whose weight is FP4 or FP8, or FP4 in place of FP8: not measured so.

    Source: embedders and the output layer are kept in 16 bit for their effect on quality.
    """
    quantized = {name_of(node): (kind, codes) for node, kind, codes in subject.quantized_products}
    for promised, paths in subject.promised.items():
        for path in paths if promised != NVFP4.name else ():
            node = product_of(subject, path)
            stored, codes = quantized.get(name_of(node), (None, "")) if node is not None else (None, "")
            if node is not None and stored is not None and stored.name != promised:
                yield Hit(f"its weight is {stored.gemm}; promised as {promised}", name_of(node), codes)


@rule("unpromised-fp4", "wrong", "export again: the promise is in the metadata")
def unpromised_fp4(subject: Subject) -> Iterator[Hit]:
    """A product of an FP4 or FP8 weight in a graph whose promise does not list it: nothing is held against that linear.

    Source: fp4trt export lists every linear; what is left out escapes the rules of the promise.
    """
    listed = {f"{path}/{kind}" for paths in subject.promised.values() for path in paths for kind in PRODUCTS}
    for node, kind, codes in subject.quantized_products if listed else ():
        if node.op_type in PRODUCTS and node.name not in listed:
            yield Hit(f"multiplies by an {kind.gemm} weight, and is not promised", name_of(node), codes)


@rule("contract-names", "wrong", "rename or reorder, or export again")
def contract_names(subject: Subject) -> Iterator[Hit]:
    """Inputs and outputs have the names, in the order, that the family's runtimes bind.

    Source: what the runtimes of NVIDIA and Black Forest Labs agree on.
    """
    for wanted, found, kind in _sides(subject):
        names = [value.name for value in found]
        expected = [tensor.name for tensor in wanted if not tensor.optional or tensor.name in names]
        for name in expected:
            if name not in names:
                yield Hit(f"the graph has no {kind} of this name; found {', '.join(names)}", tensor=name)
        for name in names:
            if name not in expected:
                yield Hit(f"an {kind} that the family does not have", tensor=name)
        if sorted(names) == sorted(expected):
            swapped = ((was, name) for was, name in zip(names, expected, strict=True) if was != name)
            for was, name in swapped:
                yield Hit(f"{kind} {was} stands where {name} is expected", tensor=name)


@rule("contract-types", "wrong", "export again")
def contract_types(subject: Subject) -> Iterator[Hit]:
    """Inputs and outputs have the types that the family's runtimes bind.

    Source: what the runtimes of NVIDIA and Black Forest Labs agree on.
    """
    for tensor, value in _pairs(subject):
        kind = value.type.tensor_type.elem_type
        if kind != tensor.type:
            yield Hit(f"its type is {type_name(kind)}; expected {type_name(tensor.type)}", tensor=value.name)


@rule("contract-dims", "wrong", "export again with symbolic batch, image and text lengths")
def contract_dims(subject: Subject) -> Iterator[Hit]:
    """Batch, image and text lengths are symbolic, under the names that the profile uses; a fixed width is the true one.

    Source: an engine of a fixed batch builds and then serves nothing else.
    """
    for tensor, value in _pairs(subject):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        wrong = len(dims) != len(tensor.shape) or any(
            (wanted is not None and found != wanted) or (wanted is None and (isinstance(found, str) or found <= 0))
            for found, wanted in zip(dims, tensor.shape, strict=True)
        )
        if wrong:
            expected = ["fixed" if size is None else size for size in tensor.shape]
            yield Hit(f"its shape is {dims}; expected {expected}", tensor=value.name)
        elif dims and (width := _width(subject, value.name)) not in (None, dims[-1]):
            yield Hit(f"its last axis is {dims[-1]}; the product that gives it has {width} columns", tensor=value.name)


RULES = (
    promised_linear,
    promised_fp4,
    promised_fp8,
    promised_sixteen_bit,
    unpromised_fp4,
    contract_names,
    contract_types,
    contract_dims,
)


def _in_another_format(subject: Subject, kind: NumberFormat) -> Iterator[Hit]:
    """Yield the linears promised in a format whose weight is stored otherwise; in FP4 it is another rule's."""
    quantized = {name_of(node) for node, found, _ in subject.quantized_products if found in (kind, NVFP4)}
    for path in subject.promised.get(kind.name, ()):
        node = product_of(subject, path)
        if node is None or name_of(node) in quantized:
            continue
        source = subject.graph.to_source(node.input[1]) if len(node.input) > 1 else ""
        stored = subject.constants[source].data_type if source in subject.constants else None
        if stored != TensorProto.FLOAT4E2M1:
            found = f"not {kind.gemm}" if stored is None else type_name(stored)
            yield Hit(f"its weight is {found}; promised in {kind.gemm}", name_of(node), source)


def _width(subject: Subject, output: str) -> int | None:
    """Return the last axis of an output by the product that gives it, None where no product does, through its bias."""
    node = subject.graph.producer.get(output)
    while node is not None and node.op_type in (*CASTS, "Add"):  # a move could change the last axis
        inner = [name for name in node.input if not subject.constant(name)]
        node = subject.graph.producer.get(inner[0]) if len(inner) == 1 else None
    if node is None or node.op_type != "MatMul":
        return None
    weight = subject.shapes.of(node.input[1])
    return weight[-1] if weight is not None and len(weight) > 1 else None


def _sides(subject: Subject) -> Iterator[tuple[tuple[Tensor, ...], list[ValueInfoProto], str]]:
    contract = contract_of(subject.metadata.get("fp4trt.family", ""))
    if contract is not None:
        others = {*subject.graph.initializers, *subject.slot_inputs}
        inputs = [value for value in subject.model.graph.input if value.name not in others]
        yield contract[0], inputs, "input"
        yield contract[1], list(subject.model.graph.output), "output"


def _pairs(subject: Subject) -> Iterator[tuple[Tensor, ValueInfoProto]]:
    for wanted, found, _ in _sides(subject):
        by_name = {value.name: value for value in found}
        for tensor in wanted:
            if tensor.name in by_name:
                yield tensor, by_name[tensor.name]
