"""Rules for linears in FP8: a QuantizeLinear on the activation, a stored weight, one scale for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from onnx import NodeProto, TensorProto

from onnx_functions.graph.element_types import attributes_of, integer
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import PRODUCTS, name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import FP8Product, Subject

__all__ = ["RULES"]


@rule("fp8-scale-value", "wrong", "calibrate or quantize again; the scale is amax / 448, in FP32")
def fp8_scale_value(subject: Subject) -> Iterator[Hit]:
    """A scale of FP8 that is zero, negative, infinite or NaN, or whose amax is below 2^-24 or above 2^24.

    Source: measured: an infinite one and one of 1e-40 are accepted, the others refused by the parser.
    """
    for node, tensor in _scales(subject):
        name = subject.constant(tensor)
        values = subject.values.get(name)
        if values is None or subject.constants[name].data_type != TensorProto.FLOAT:
            continue
        if values.nan or values.infinite or values.negative or values.all_zero:
            shown = values.scalar if values.scalar is not None else "not positive and finite throughout"
            yield Hit(f"the scale is {shown}; expected a positive number", name_of(node), name)
        elif values.scalar is not None and not _LEAST_AMAX <= values.scalar * _E4M3_MAX <= _LARGEST_AMAX:
            found = f"the scale is {values.scalar:.3g}, of amax {values.scalar * _E4M3_MAX:.3g}"
            yield Hit(f"{found}; expected 2^-24 to 2^24", name_of(node), name)


@rule("fp8-scale-axis", "slow", "take one scale for the whole tensor, amax / 448")
def fp8_scale_axis(subject: Subject) -> Iterator[Hit]:
    """Scales of FP8 along the sum, of the weight or the activation, cannot be applied behind it: it runs in 16 bit.

    Source: measured: a kernel that reads FP8, unpacks both operands and multiplies them in 16 bit.
    """
    for product in subject.fp8_products:
        name = subject.constant(product.scale)
        if name and math.prod(subject.dims(name)) > 1 and not _is_per_output(subject, product):
            axis = integer(attributes_of(product.values), "axis", 1)
            found = f"the weight has scales {list(subject.dims(name))} along axis {axis}; expected one"
            yield Hit(found, name_of(product.values), name)
    for quantizer in subject.fp8_quantizers:
        name = subject.constant(_scale(quantizer))
        if name and math.prod(subject.dims(name)) > 1 and _linears_behind(subject, quantizer):
            yield Hit(f"the activation has scales {list(subject.dims(name))}; expected one", name_of(quantizer), name)


@rule("fp8-scale-form", "warning", "take one FP32 scale for the whole tensor, amax / 448")
def fp8_scale_form(subject: Subject) -> Iterator[Hit]:
    """Scales of an FP8 weight for each output cost a kernel behind the GEMM, and 16-bit scales are rounded.

    Source: measured: both keep the FP8 GEMM.
    """
    for product in subject.fp8_products:
        name = subject.constant(product.scale)
        if name and math.prod(subject.dims(name)) > 1 and _is_per_output(subject, product):
            found = f"the weight has {subject.dims(name)[0]} scales, one for each output"
            yield Hit(found, name_of(product.values), name)
    for node, tensor in _scales(subject):
        name = subject.constant(tensor)
        kind = subject.constants[name].data_type if name else TensorProto.FLOAT
        if kind != TensorProto.FLOAT:
            yield Hit(f"the scale is {type_name(kind)}; expected FLOAT", name_of(node), name)


@rule("fp8-scale-constant", "slow", "calibrate, and store the scale as an FP32 initializer")
def fp8_scale_constant(subject: Subject) -> Iterator[Hit]:
    """The scales of FP8 have to be initializers: with one that is computed, the product runs in 16 bit.

    Source: measured with the activation's scale out of a graph input.
    """
    for node, tensor in _scales(subject):
        if not subject.constant(tensor):
            yield Hit(f"its scale {tensor or '(missing)'} is not an initializer", name_of(node), tensor)


@rule("fp8-dequantize-scale", "wrong", "dequantize an activation with its quantizer's own scale")
def fp8_dequantize_scale(subject: Subject) -> Iterator[Hit]:
    """An FP8 activation that is dequantized with another scale than it was quantized with is off by a factor.

    Two initializers of equal value count as one scale. Source: measured: accepted.
    """
    for quantizer in subject.fp8_quantizers:
        own = _scale(quantizer)
        for node in subject.graph.consumers.get(quantizer.output[0], ()):
            read = _scale(node)
            if node.op_type == "DequantizeLinear" and not subject.is_same_scale(read, own):
                yield Hit(f"reads the scale {read}; {name_of(quantizer)} reads {own}", name_of(node), read)


@rule("fp8-quantizer", "wrong", "leave out saturate and precision: values saturate at 448, quotients are FP32")
def fp8_quantizer(subject: Subject) -> Iterator[Hit]:
    """A QuantizeLinear to FP8 that does not saturate, or divides in 16 bit, means other numbers than it is built with.

    By the standard values beyond 448 are NaN without saturation. Source: measured: both attributes are accepted and
    the same engine is built; the ONNX specification.
    """
    for node in subject.fp8_quantizers:
        attributes = attributes_of(node)
        if not integer(attributes, "saturate", 1):
            yield Hit("saturate is 0; expected 1", name_of(node))
        precision = integer(attributes, "precision", 0)
        if precision not in (0, TensorProto.FLOAT):
            yield Hit(f"precision is {type_name(precision)}; expected FLOAT", name_of(node))


@rule("fp8-zero-point", "wrong", "drop the zero point: FP8 is symmetric")
def fp8_zero_point(subject: Subject) -> Iterator[Hit]:
    """FP8 has no zero point; only one of FP8 zeros changes nothing.

    Source: measured: any is accepted, and none is used.
    """
    nodes = [product.values for product in subject.fp8_products] + list(subject.fp8_quantizers)
    for quantizer in subject.fp8_quantizers:
        nodes += subject.graph.consumers.get(quantizer.output[0], ())
    for node in {id(node): node for node in nodes}.values():
        tensor = node.input[2] if len(node.input) > 2 and node.op_type in _QDQ else ""
        values = subject.values.get(subject.constant(tensor)) if tensor else None
        if tensor and not (values is not None and values.all_zero):
            yield Hit(f"has the zero point {tensor}", name_of(node), tensor)


@rule("fp8-activation", "slow", "quantize the activation with QuantizeLinear to FP8, right before the product")
def fp8_activation(subject: Subject) -> Iterator[Hit]:
    """An FP8 weight whose activation is not quantized to FP8 is unpacked to 16 bit and multiplied there.

    A Mul by a vector between the dequantized activation and the product does the same. A graph that promises nothing
    and quantizes no activation is weight-only by intent: not a finding of this rule. Source: measured.
    """
    if not subject.fp8_quantizers and not subject.promises:
        return
    for product in subject.fp8_products:
        node = product.node
        if product.multiplies and subject.fp8_quantizer_of(node.input[0]) is None:
            found = f"multiplies {node.input[0]}, which is not quantized to FP8"
            yield Hit(found, name_of(node), product.codes)


@rule("fp8-weight-product", "slow", "let the weight reach a MatMul's second input through Cast and Transpose alone")
def fp8_weight_product(subject: Subject) -> Iterator[Hit]:
    """An FP8 weight that something else than a product reads, such as a Mul by a vector, is unpacked to 16 bit.

    Source: measured; a Mul by a scalar is folded into the scale.
    """
    multiplied = {product.codes for product in subject.fp8_products if product.multiplies}
    for product in subject.fp8_products:
        if product.codes not in multiplied and not product.multiplies:
            yield Hit(f"a {product.node.op_type} reads the dequantized weight", name_of(product.node), product.codes)


@rule("fp8-idle", "slow", "quantize the weight too, or leave the activation in 16 bit")
def fp8_idle(subject: Subject) -> Iterator[Hit]:
    """An FP8 activation that is multiplied by what is not FP8 costs accuracy and time for nothing.

    Source: measured: the product runs in 16 bit.
    """
    weights = {id(product.node) for product in subject.fp8_products}
    for node in subject.model.graph.node:
        if node.op_type not in PRODUCTS or id(node) in weights:
            continue
        quantizers = [subject.fp8_quantizer_of(tensor) for tensor in node.input[:2]]
        found = [quantizer for quantizer in quantizers if quantizer is not None]
        if len(found) == 1:  # with two it is a product of two activations, as in attention
            other = node.input[1 - quantizers.index(found[0])]
            yield Hit(
                f"multiplies what {name_of(found[0])} quantizes by {other}, which is not FP8", name_of(node), other
            )


RULES = (
    fp8_scale_value,
    fp8_scale_axis,
    fp8_scale_form,
    fp8_scale_constant,
    fp8_dequantize_scale,
    fp8_quantizer,
    fp8_zero_point,
    fp8_activation,
    fp8_weight_product,
    fp8_idle,
)

_E4M3_MAX: Final = 448.0
_LEAST_AMAX: Final = 2.0**-24
_LARGEST_AMAX: Final = 2.0**24
_QDQ: Final = ("QuantizeLinear", "DequantizeLinear")


def _scale(node: NodeProto) -> str:
    return node.input[1] if len(node.input) > 1 else ""


def _scales(subject: Subject) -> Iterator[tuple[NodeProto, str]]:
    """Yield the nodes that read a scale of FP8, and the scale: of weights and of activations."""
    seen = set()
    for product in subject.fp8_products:
        if id(product.values) not in seen:
            seen.add(id(product.values))
            yield product.values, product.scale
    for quantizer in subject.fp8_quantizers:
        yield quantizer, _scale(quantizer)


def _is_per_output(subject: Subject, product: FP8Product) -> bool:
    """Whether a weight's scales are one for each output: along its first axis [N, K], or its second [K, N]."""
    wanted, dims = (0 if product.turned else 1), subject.dims(product.codes)
    axis = integer(attributes_of(product.values), "axis", 1) % max(len(dims), 1)
    scales = subject.dims(subject.constant(product.scale))
    return len(dims) == 2 and axis == wanted and scales == (dims[wanted],)


def _linears_behind(subject: Subject, quantizer: NodeProto) -> bool:
    """Whether a product with an FP8 weight reads what a quantizer gives."""
    return any(subject.fp8_quantizer_of(product.node.input[0]) is quantizer for product in subject.fp8_products)
