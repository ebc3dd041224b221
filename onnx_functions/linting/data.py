"""Rules for what the tensors hold. The files are read once, in chunks, by values.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from onnx import NodeProto, TensorProto

from onnx_functions.graph.index import PRODUCTS, SOURCE, name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES"]


@rule("block-scale-values", "wrong", "the file is damaged, or another tool's packer is wrong: quantize again")
def block_scale_values(subject: Subject) -> Iterator[Hit]:
    """A NaN or negative block scale makes NaN or wrong signs of 16 weights.

    Source: measured: both are accepted. FLOAT8E4M3FN has no infinity.
    """
    for chain in subject.weights:
        values = subject.values.get(chain.block_scales)
        if values is not None and (bad := values.nan + values.infinite + values.negative):
            found = f"{bad} of {math.prod(subject.dims(chain.block_scales))} block scales are negative or not finite"
            yield Hit(found, name_of(chain.values), chain.block_scales)


@rule("activation-scale-value", "wrong", "calibrate again; the scale is amax / (6 * 448)")
def activation_scale_value(subject: Subject) -> Iterator[Hit]:
    """An activation's global scale that is zero, negative, infinite or NaN makes noise of the whole tensor.

    Source: measured: all four are accepted.
    """
    for chain in subject.activations:
        yield from _bad_scale(subject, chain.quantizer, chain.scale)


@rule("weight-global-scale-value", "wrong", "quantize again; the scale is amax / (6 * 448)")
def weight_global_scale_value(subject: Subject) -> Iterator[Hit]:
    """A weight's global scale that is zero, negative, infinite or NaN makes noise of the whole weight.

    Source: measured: an infinite one is accepted, the others are refused by the parser.
    """
    for chain in subject.weights:
        if chain.scales is not None:
            yield from _bad_scale(subject, chain.scales, chain.global_scale)


@rule("scale-magnitude", "wrong", "calibrate or quantize again; the scale is amax / (6 * 448), in FP32")
def scale_magnitude(subject: Subject) -> Iterator[Hit]:
    """A global scale whose amax, 6 * 448 times as large, is below 2^-24 or above 2^24 is no real layer's.

    Below 2^-24, the least positive number of FP16, a whole tensor would be zero in 16 bit; 2^24 is over a hundred times
    what activations of transformers in 16 bit reach (FP16 ends at 65504), and leaves room for a headroom of 64. What
    makes such scales is a factor of 6 * 448 that was taken twice, or bytes of another tensor. Source: the formats.
    """
    readers = [(chain.scales, chain.global_scale) for chain in subject.weights if chain.scales is not None]
    readers += [(chain.quantizer, chain.scale) for chain in subject.activations]
    for node, tensor in readers:
        scale = subject.scalar(tensor)
        if scale is not None and 0 < scale < math.inf and not _LEAST_AMAX <= scale * _SCALE_TO_AMAX <= _LARGEST_AMAX:
            found = f"the global scale is {scale:.3g}, of amax {scale * _SCALE_TO_AMAX:.3g}; expected 2^-24 to 2^24"
            yield Hit(found, name_of(node), subject.constant(tensor))


@rule("plain-weight-values", "wrong", "the source checkpoint or the file is damaged: check it, and export again")
def plain_weight_values(subject: Subject) -> Iterator[Hit]:
    """A NaN in a weight or bias, or an infinity in a matrix or bias, ends in every output.

    Source: measured: accepted. Infinite masks of attention are meant, so of what no product reads only NaN counts;
    with a promise all that has one axis is a bias or a norm.
    """
    scales = {name for chain in subject.weights for name in (chain.block_scales, subject.constant(chain.global_scale))}
    scales |= {subject.constant(chain.scale) for chain in subject.activations}
    scales |= {subject.constant(product.scale) for product in subject.fp8_products}
    for name, values in subject.values.items():
        dims = subject.dims(name)
        if name in scales or not dims or math.prod(dims) == 1:
            continue
        counts = (subject.promises and len(dims) == 1) or _is_multiplied(subject, name)
        infinite = values.infinite if counts else 0
        if values.nan + infinite:
            found = f"{values.nan} of {math.prod(dims)} elements are NaN and {infinite} infinite"
            yield Hit(found, tensor=name)


@rule("zero-weight", "warning", "check that the weights file was downloaded or copied in full")
def zero_weight(subject: Subject) -> Iterator[Hit]:
    """A matrix that is zero throughout is most often a hole in a file that was not copied in full.

    Source: a file of the right length passes every other check.
    """
    parts = {name for chain in subject.weights for name in (chain.codes, chain.block_scales)}
    for name, values in subject.values.items():
        if values.all_zero and (name in parts or (len(subject.dims(name)) == 2 and _is_multiplied(subject, name))):
            yield Hit("all elements are zero", tensor=name)


RULES = (
    block_scale_values,
    activation_scale_value,
    weight_global_scale_value,
    scale_magnitude,
    plain_weight_values,
    zero_weight,
)

_SCALE_TO_AMAX: Final = 6.0 * 448.0
_LEAST_AMAX: Final = 2.0**-24
_LARGEST_AMAX: Final = 2.0**24


def _bad_scale(subject: Subject, node: NodeProto, tensor: str) -> Iterator[Hit]:
    name = subject.constant(tensor)
    values = subject.values.get(name)
    if values is None or subject.constants[name].data_type != TensorProto.FLOAT:
        return
    if values.nan or values.infinite or values.negative or values.all_zero:
        shown = values.scalar if values.scalar is not None else "not positive and finite throughout"
        yield Hit(f"the global scale is {shown}; expected a positive number", name_of(node), name)


def _is_multiplied(subject: Subject, tensor: str) -> bool:
    """Whether a matrix product reads a tensor, moved, cast or dequantized."""
    return any(reader.node.op_type in PRODUCTS for reader in subject.graph.readers(tensor, SOURCE))
