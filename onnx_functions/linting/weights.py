"""Rules for the chains that dequantize FP4 weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from onnx import NodeProto, TensorProto

from onnx_functions.graph.element_types import attributes_of, integer
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import ALIASES, name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Product, Subject, WeightChain

__all__ = ["RULES", "output_type"]

_BLOCK = 16


@rule("weight-block-size", "wrong", "NVFP4 has blocks of 16: quantize again, and declare 16")
def weight_block_size(subject: Subject) -> Iterator[Hit]:
    """FP4 GEMMs read one block scale for 16 codes, whatever `block_size` says, so 32 or 64 give other numbers.

    Source: measured; the NVFP4 format.
    """
    for chain in subject.weights:
        size = integer(attributes_of(chain.values), "block_size", 0)
        if size != _BLOCK:
            found = f"block_size is {size}" if size else "block_size is missing"
            yield Hit(f"{found}; expected {_BLOCK}", name_of(chain.values), chain.codes)


@rule("weight-scale-shape", "wrong", "store one block scale for 16 codes of the last axis")
def weight_scale_shape(subject: Subject) -> Iterator[Hit]:
    """Block scales that are not [N, K/16] are read past their end, or belong to other codes.

    Scales of K/32 are accepted without a word, transposed ones are refused by the parser. Where the axis is 0 the
    shape is another one: a rule of its own. Source: measured.
    """
    for chain in subject.weights:
        if not chain.block_scales or _axis_is_first(subject, chain):
            continue
        codes, scales = subject.dims(chain.codes), subject.dims(chain.block_scales)
        if not codes or codes[-1] % _BLOCK:
            yield Hit(f"codes are {list(codes)}; expected a last axis in blocks of 16", _name(chain), chain.codes)
        elif scales != (*codes[:-1], codes[-1] // _BLOCK):
            wanted = [*codes[:-1], codes[-1] // _BLOCK]
            turned = " (transposed)" if list(scales) == wanted[::-1] else ""
            found = f"block scales are {list(scales)}{turned}; expected {wanted} for codes {list(codes)}"
            yield Hit(found, _name(chain), chain.block_scales)


@rule("weight-axis", "slow", "quantize along the last axis [N, K] and write axis=-1")
def weight_axis(subject: Subject) -> Iterator[Hit]:
    """A weight in blocks along another axis than the last is unpacked to 16 bit and multiplied there.

    Source: measured.
    """
    for chain in subject.weights:
        if _axis_is_first(subject, chain):
            axis = integer(attributes_of(chain.values), "axis", 1)
            yield Hit(f"blocks lie along axis {axis}; expected the last axis", _name(chain), chain.codes)


@rule("weight-codes-type", "wrong", "store the codes as FLOAT4E2M1, two a byte, the first in the low nibble")
def weight_codes_type(subject: Subject) -> Iterator[Hit]:
    """Codes under block scales of scales that are not FLOAT4E2M1 are read as numbers of another format.

    INT4 has as many bits and other values. Source: measured; the NVFP4 format.
    """
    for chain in subject.weights:
        kind = subject.constants[chain.codes].data_type
        if kind != TensorProto.FLOAT4E2M1:
            yield Hit(f"codes are {type_name(kind)}; expected FLOAT4E2M1", _name(chain), chain.codes)


@rule("weight-scale-type", "wrong", "store the block scales as FLOAT8E4M3FN")
def weight_scale_type(subject: Subject) -> Iterator[Hit]:
    """Block scales under a global scale have to be FLOAT8E4M3FN: the only type of NVFP4's block scales.

    Source: the NVFP4 format; other FP8 types are refused by the parser.
    """
    for chain in subject.weights:
        if chain.scales is not None and chain.block_scales:
            kind = subject.constants[chain.block_scales].data_type
            if kind != TensorProto.FLOAT8E4M3FN:
                found = f"block scales are {type_name(kind)}; expected FLOAT8E4M3FN"
                yield Hit(found, _name(chain), chain.block_scales)


@rule("weight-single-dequantize", "slow", "store FP8 block scales and one FP32 global scale, in two DequantizeLinear")
def weight_single_dequantize(subject: Subject) -> Iterator[Hit]:
    """FP4 codes with block scales in FP32 or BF16, in one DequantizeLinear, are unpacked to 16 bit.

    Source: measured.
    """
    for chain in subject.weights:
        if chain.scales is None:
            yield Hit("block scales are no FP8 with a global scale", _name(chain), chain.block_scales or chain.codes)


@rule("weight-scale-constant", "slow", "make block scales and global scale initializers")
def weight_scale_constant(subject: Subject) -> Iterator[Hit]:
    """Scales of a weight that are computed at run time cost its FP4 GEMM.

    Source: measured with a global scale out of a graph input.
    """
    for chain in subject.weights:
        if chain.scales is None:
            continue
        for tensor, what in ((chain.scales.input[0], "block scales"), (chain.global_scale, "global scale")):
            if not subject.constant(tensor):
                yield Hit(f"{what} {tensor} is not an initializer", name_of(chain.scales), tensor)


@rule("weight-scales-crossed", "wrong", "let each weight read its own block scales")
def weight_scales_crossed(subject: Subject) -> Iterator[Hit]:
    """Codes under the block scales of another weight of the same shape build and give noise.

    They are known by being read with two weights' codes, or by name: `X.weight_scale` with other codes than `X.weight`.
    Source: measured.
    """
    readers: defaultdict[str, set[str]] = defaultdict(set)
    for chain in subject.weights:
        readers[chain.block_scales].add(chain.codes)
    codes = {chain.codes for chain in subject.weights}
    for chain in subject.weights:
        owner = chain.block_scales.removesuffix("_scale")  # by the names of a ModelOpt checkpoint
        if owner == chain.codes or not chain.block_scales:
            continue
        if owner in codes or len(readers[chain.block_scales]) > 1:
            found = f"{chain.codes} is dequantized with the block scales {chain.block_scales}"
            yield Hit(found, _name(chain), chain.block_scales)


@rule("weight-output-type", "wrong", "set output_dtype on both DequantizeLinear, or on neither with a Cast behind")
def weight_output_type(subject: Subject) -> Iterator[Hit]:
    """Two DequantizeLinear of one chain with different types fail in the builder, for weights and activations.

    Source: measured.
    """
    found = [chain.values for chain in subject.weights]
    found += [values for chain in subject.activations for values in chain.values]
    for values in found:
        # A Cast in between gives them one type.
        scales = subject.graph.producer.get(subject.graph.through(values.input[1], ALIASES))
        if scales is None or scales.op_type != "DequantizeLinear":
            continue
        second = integer(attributes_of(values), "output_dtype", 0)
        # Without the attribute the type is that of the scale.
        if second and second != output_type(subject, scales):
            first = type_name(output_type(subject, scales))
            yield Hit(f"output_dtype is {type_name(second)}, its scales are {first}", name_of(values))


@rule("global-scale-type", "wrong", "store one FP32 number, a tensor of shape []")
def global_scale_type(subject: Subject) -> Iterator[Hit]:
    """A global scale is one FP32 number: in BF16 it loses bits or fails in the builder, per channel FP4 is lost.

    Source: measured; the NVFP4 format.
    """
    readers = [(chain.scales, chain.global_scale) for chain in subject.weights if chain.scales is not None]
    readers += [(chain.quantizer, chain.scale) for chain in subject.activations]
    seen = set()
    for node, tensor in readers:
        name = subject.constant(tensor)
        if not name or name in seen:
            continue
        seen.add(name)
        stored = subject.constants[name]
        if stored.data_type != TensorProto.FLOAT or math.prod(stored.dims) != 1:
            found = f"global scale is {type_name(stored.data_type)} {list(stored.dims)}; expected one FLOAT"
            yield Hit(found, name_of(node), name)


@rule("weight-product", "slow", "let the weight reach a MatMul's second input through Cast and Transpose alone")
def weight_product(subject: Subject) -> Iterator[Hit]:
    """An FP4 weight has to reach the second input of a MatMul, transposed once, with nothing else between.

    A Mul by a vector or by a scalar other than 1 loses FP4, and so does a weight that is not transposed: its blocks
    lie across the sum. A Gemm does as well as a MatMul. What reads the weight besides costs a copy in 16 bit.
    Source: measured.
    """
    multiplied = {product.chain.codes for product in subject.products if _fault(product) is None}
    for product in subject.products:
        fault = _fault(product)
        if fault is not None and product.chain.codes not in multiplied:
            yield Hit(fault, name_of(product.node), product.chain.codes)


RULES = (
    weight_block_size,
    weight_scale_shape,
    weight_axis,
    weight_codes_type,
    weight_scale_type,
    weight_single_dequantize,
    weight_scale_constant,
    weight_scales_crossed,
    weight_output_type,
    global_scale_type,
    weight_product,
)


def _name(chain: WeightChain) -> str:
    return name_of(chain.values)


def _axis_is_first(subject: Subject, chain: WeightChain) -> bool:
    rank = len(subject.dims(chain.codes))
    return integer(attributes_of(chain.values), "axis", 1) not in (-1, rank - 1)


def output_type(subject: Subject, scales: NodeProto) -> int:
    """Return the type that the first DequantizeLinear of a chain gives."""
    attributes = attributes_of(scales)
    name = subject.constant(scales.input[1])
    stored = subject.constants[name].data_type if name else int(TensorProto.FLOAT)
    return integer(attributes, "output_dtype", 0) or stored


def _fault(product: Product) -> str | None:
    """Return what keeps a reader of a weight from being an FP4 GEMM, None where nothing does."""
    if not product.multiplies:
        return f"a {product.node.op_type} reads the dequantized weight"
    return None if product.turned else "reads the weight [N, K] without its transposition"
