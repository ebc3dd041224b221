"""Rules for activation quantizers and the chains that dequantize what they give."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from onnx_functions.graph.element_types import attributes_of, integer
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import PRODUCTS, name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Product, Subject

__all__ = ["RULES"]

_BLOCK = 16


@rule("activation-block-size", "wrong", "write block_size=16")
def activation_block_size(subject: Subject) -> Iterator[Hit]:
    """An activation quantizer has blocks of 16, and says so: without the attribute the importer's default decides.

    Any other size is refused by the parser. Source: measured.
    """
    yield from _attribute(subject, "block_size", (_BLOCK,))


@rule("activation-axis", "wrong", "write axis=-1")
def activation_axis(subject: Subject) -> Iterator[Hit]:
    """An activation is quantized along its last axis; without the attribute the importer takes axis 1.

    Refused by the parser for [B, L, K]; for [B, K] axis 1 is the last. Source: measured.
    """
    for chain in subject.activations:
        axis = integer(attributes_of(chain.quantizer), "axis", 0)
        if not _is_last(subject, chain.quantizer.output[0], axis):
            found = f"axis is {axis}" if axis else "axis is missing"
            yield Hit(f"{found}; expected -1", name_of(chain.quantizer))


@rule("activation-scale-type", "wrong", "write scale_type=17 (FLOAT8E4M3FN)")
def activation_scale_type(subject: Subject) -> Iterator[Hit]:
    """An activation's block scales are FLOAT8E4M3FN, and the quantizer says so by scale_type 17.

    Without the attribute the importer's default decides; another type is refused by the parser. Source: measured.
    """
    yield from _attribute(subject, "scale_type", (int(TensorProto.FLOAT8E4M3FN),))


@rule("activation-scale-constant", "wrong", "calibrate, and store the scale as an FP32 initializer")
def activation_scale_constant(subject: Subject) -> Iterator[Hit]:
    """The global scale of an activation quantizer has to be an initializer.

    A computed one is refused by the parser. Source: measured.
    """
    for chain in subject.activations:
        if not subject.constant(chain.scale):
            found = f"its scale {chain.scale or '(missing)'} is not an initializer"
            yield Hit(found, name_of(chain.quantizer), chain.scale)


@rule("activation-dequantize-scale", "wrong", "dequantize the block scales with their quantizer's own scale")
def activation_dequantize_scale(subject: Subject) -> Iterator[Hit]:
    """Block scales that are dequantized with another global scale than they were quantized with give other numbers.

    Two initializers of equal value count as one scale. Source: measured.
    """
    for chain in subject.activations:
        for node in chain.scales:
            read = node.input[1] if len(node.input) > 1 else ""
            if not subject.is_same_scale(read, chain.scale):
                found = f"reads the scale {read}; its quantizer {name_of(chain.quantizer)} reads {chain.scale}"
                yield Hit(found, name_of(node), read)


@rule("activation-scales-crossed", "wrong", "dequantize the codes with the block scales of the same quantizer")
def activation_scales_crossed(subject: Subject) -> Iterator[Hit]:
    """Codes that are dequantized with the block scales of another quantizer give noise.

    Accepted where both have the same shape. Source: measured.
    """
    for chain in subject.activations:
        own = {node.output[0] for node in chain.scales}
        for node in chain.values:
            if (len(node.input) > 1 and subject.graph.through_casts(node.input[1])) not in own:
                found = f"reads the block scales {node.input[1]}, which are not of {name_of(chain.quantizer)}"
                yield Hit(found, name_of(node), node.input[1])


@rule("activation-dequantize", "wrong", "write axis=-1 and block_size=16 on the DequantizeLinear of the codes")
def activation_dequantize(subject: Subject) -> Iterator[Hit]:
    """The codes of an activation are dequantized as they were made: along the last axis, in blocks of 16.

    Another block size is accepted and read as 16, another axis refused by the parser. Source: measured.
    """
    for chain in subject.activations:
        for node in chain.values:
            attributes = attributes_of(node)
            size, axis = integer(attributes, "block_size", 0), integer(attributes, "axis", 1)
            if size != _BLOCK or not _is_last(subject, node.input[0], axis):
                yield Hit(f"axis is {axis} and block_size {size}; expected -1 and {_BLOCK}", name_of(node))


@rule("activation-missing", "slow", "quantize the activation with TRT_FP4DynamicQuantize, as calibrated")
def activation_missing(subject: Subject) -> Iterator[Hit]:
    """An FP4 weight whose activation is not quantized is unpacked to 16 bit and multiplied there.

    A graph that promises nothing and quantizes no activation at all is weight-only by intent: not a finding of this
    rule. Source: measured.
    """
    if not subject.activations and not subject.promises:
        return
    for product in _matmuls(subject):
        tensor = product.node.input[0]
        if subject.quantizer_of(tensor) is None and _behind(subject, tensor) is None:
            yield Hit(f"multiplies {tensor}, which is not quantized", name_of(product.node), product.chain.codes)


@rule("activation-product", "wrong", "let the dequantized activation reach the MatMul through a Cast alone")
def activation_product(subject: Subject) -> Iterator[Hit]:
    """An operator between the dequantized activation and its FP4 MatMul breaks the build, or loses FP4.

    Source: measured with a Mul by a vector.
    """
    for product in _matmuls(subject):
        node = _behind(subject, product.node.input[0])
        if node is not None and subject.quantizer_of(product.node.input[0]) is None:
            found = f"a {node.op_type} stands between the quantized activation and {name_of(product.node)}"
            yield Hit(found, name_of(node), product.chain.codes)


@rule("activation-idle", "slow", "quantize the weight too, or leave the activation in 16 bit")
def activation_idle(subject: Subject) -> Iterator[Hit]:
    """A quantized activation that is multiplied by a weight that is not FP4 costs accuracy and time for nothing.

    Source: measured: the product runs in 16 bit.
    """
    quantized = {id(product.node) for product in subject.products}
    for node in subject.model.graph.node:
        if node.op_type not in PRODUCTS or id(node) in quantized:
            continue
        quantizer = subject.quantizer_of(node.input[0])
        if quantizer is not None:
            found = f"multiplies what {name_of(quantizer)} quantizes by {node.input[1]}, which is not FP4"
            yield Hit(found, name_of(node), node.input[1])


@rule("weight-only", "warning", "for FP4 GEMMs quantize the activations too")
def weight_only(subject: Subject) -> Iterator[Hit]:
    """FP4 weights with 16-bit activations save storage and run as 16-bit GEMMs: legal where nothing else is promised.

    Source: measured.
    """
    if subject.weights and not subject.activations and not subject.promises:
        codes = subject.weights[0].codes
        found = f"{len(subject.weights)} FP4 weights and no activation quantizer: a weight-only graph"
        yield Hit(found, tensor=codes)


@rule("merge-scales", "warning", "give linears that read the same input one pair of global scales")
def merge_scales(subject: Subject) -> Iterator[Hit]:
    """Linears of one input merge into one FP4 GEMM only where both their global scales are equal.

    Source: measured (31 GEMMs instead of 30 on the built-in model). With a promise its groups are judged, else all
    linears that read one tensor.
    """
    groups: dict[object, list[Product]] = {}
    declared = subject.declared("fp4trt.groups")
    groups_of = [group for group in declared if isinstance(group, list)] if isinstance(declared, list) else None
    member = {str(path): i for i, group in enumerate(groups_of) for path in group} if groups_of is not None else None
    for product in _matmuls(subject):
        quantizer = subject.quantizer_of(product.node.input[0])
        if quantizer is not None:
            path = product.node.name.rpartition("/")[0]
            key: object = member.get(path, path) if member is not None else quantizer.input[0]
            groups.setdefault(key, []).append(product)
    for products in groups.values():
        scales = {(_weight_scale(subject, product), _input_scale(subject, product)) for product in products}
        if len(scales) > 1:
            names = ", ".join(name_of(product.node) for product in products)
            yield Hit(f"{names} read one input and have {len(scales)} pairs of scales", name_of(products[0].node))


RULES = (
    activation_block_size,
    activation_axis,
    activation_scale_type,
    activation_scale_constant,
    activation_dequantize_scale,
    activation_scales_crossed,
    activation_dequantize,
    activation_missing,
    activation_product,
    activation_idle,
    weight_only,
    merge_scales,
)


def _attribute(subject: Subject, name: str, allowed: tuple[int, ...]) -> Iterator[Hit]:
    for chain in subject.activations:
        value = integer(attributes_of(chain.quantizer), name, 0)
        if value not in allowed:
            shown = type_name(value) if name == "scale_type" and value else str(value)
            found = f"{name} is {shown}" if value else f"{name} is missing"
            yield Hit(f"{found}; expected {allowed[0]}", name_of(chain.quantizer))


def _is_last(subject: Subject, tensor: str, axis: int) -> bool:
    """Whether an axis is a tensor's last; with an unknown rank, whether it can be: the parser refuses the others."""
    shape = subject.shapes.declared.get(tensor)
    rank = None if shape is None else len(shape)
    return axis == -1 or (axis > 0 and rank is None) or (rank is not None and axis == rank - 1 > 0)


def _matmuls(subject: Subject) -> Iterator[Product]:
    return (product for product in subject.products if product.multiplies)


def _behind(subject: Subject, tensor: str) -> NodeProto | None:
    """Return the node that makes a tensor of dequantized codes and something else."""
    node = subject.graph.producer.get(subject.graph.to_source(tensor))
    if node is None or node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    return node if any(subject.quantizer_of(name) is not None for name in node.input) else None


def _weight_scale(subject: Subject, product: Product) -> object:
    value = subject.scalar(product.chain.global_scale)
    return value if value is not None else product.chain.global_scale


def _input_scale(subject: Subject, product: Product) -> object:
    quantizer = subject.quantizer_of(product.node.input[0])
    assert quantizer is not None
    value = subject.scalar(quantizer.input[1])
    return value if value is not None else quantizer.input[1]
