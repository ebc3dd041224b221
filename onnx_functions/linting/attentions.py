"""Rules for attention in FP8: two products whose operands are rounded to E4M3, with a Softmax between them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from onnx import TensorProto

from onnx_functions.graph.attentions import KEY, Attention, Operand, find_attentions
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES"]

_LEAST: Final = 1 / 448
"""Scale of probabilities: E4M3 reaches 448, and they reach 1."""

_MOST: Final = 1 / 64
"""Likewise: with a larger one the usual probability among 4608 tokens is below the normal numbers of E4M3."""

_NEAR: Final = 1e-3

_LARGEST_AMAX: Final = 2.0**24


@rule("attention-operand", "slow", "round q, k, v and what Softmax gives to E4M3 before the products, or none of them")
def attention_operand(subject: Subject) -> Iterator[Hit]:
    """An attention with an operand in FP8 needs all four there, or it is no longer one kernel.

    Source: measured.
    """
    promised = _promised(subject)
    for attention in find_attentions(subject.graph):
        started = attention.path in promised or len(attention.missing) < len(attention.operands)
        for operand in attention.operands if started else ():
            if operand.quantize is None:
                product = attention.output if operand.name in ("softmax", "v") else attention.scores
                yield Hit(f"the {operand.name} of {attention.path} is not in FP8", name_of(product), operand.tensor)


@rule("attention-scale-value", "wrong", "calibrate again: a scale is amax / 448")
def attention_scale_value(subject: Subject) -> Iterator[Hit]:
    """A scale of an attention's operand that is no positive number, or that no amax can give, makes noise of it.

    Its amax, 448 times as large, is between 2^-24 and 2^24. Source: measured; what a layer can have at all.
    """
    for _, operand in _rounded(subject):
        value = subject.scalar(operand.scale)
        if value is None:
            continue
        if not math.isfinite(value) or not 1 / _LARGEST_AMAX <= value * 448 <= _LARGEST_AMAX:
            yield Hit(f"the scale is {value:g}", _quantizer(operand), operand.scale)


@rule("attention-scale-constant", "wrong", "calibrate, and store the scale as one FP32 initializer")
def attention_scale_constant(subject: Subject) -> Iterator[Hit]:
    """The scale of an attention's operand is one stored FP32 number.

    Source: measured: TensorRT-RTX takes BF16, which loses bits; per channel the kernel is lost.
    """
    for _, operand in _rounded(subject):
        name = subject.constant(operand.scale)
        if not name:
            yield Hit("the scale is not an initializer", _quantizer(operand), operand.scale)
        elif subject.constants[name].data_type != TensorProto.FLOAT or math.prod(subject.dims(name)) != 1:
            kind = type_name(subject.constants[name].data_type)
            yield Hit(f"the scale is {kind}{list(subject.dims(name))}", _quantizer(operand), operand.scale)


@rule("attention-softmax-scale", "wrong", "write 1 / 448")
def attention_softmax_scale(subject: Subject) -> Iterator[Hit]:
    """Probabilities are in [0, 1]: a scale below 1 / 448 cuts the large ones off, one far above rounds the small to 0.

    Source: E4M3 reaches 448, and its normal numbers begin at 2^-6.
    """
    for _, operand in _rounded(subject):
        value = subject.scalar(operand.scale)
        if operand.name != "softmax" or value is None or not 0 < value < math.inf:
            continue
        if not _LEAST * (1 - _NEAR) <= value <= _MOST:
            yield Hit(f"the scale is {value:g}; expected {_LEAST:.6f}", _quantizer(operand), operand.scale)


@rule("attention-dequantize-scale", "wrong", "dequantize with the quantizer's own scale")
def attention_dequantize_scale(subject: Subject) -> Iterator[Hit]:
    """An operand that is dequantized with another scale than it was quantized with is another operand.

    Two initializers of equal value count as one scale. Source: measured.
    """
    for _, operand in _rounded(subject):
        assert operand.dequantize is not None
        read = operand.dequantize.input[1] if len(operand.dequantize.input) > 1 else ""
        if not subject.is_same_scale(read, operand.scale):
            found = f"reads the scale {read}; {_quantizer(operand)} reads {operand.scale}"
            yield Hit(found, name_of(operand.dequantize), read)


@rule("promised-attention", "wrong", "export again")
def promised_attention(subject: Subject) -> Iterator[Hit]:
    """Attentions in FP8 are those that the promise lists, no others, and each reads its own scales.

    A.q_scale for the query of attention A, A.k_scale, A.v_scale. Source: coverage and validation find them so.
    """
    promised = _promised(subject)
    found = {attention.path: attention for attention in find_attentions(subject.graph)}
    for path in promised:
        if path not in found:
            yield Hit("the graph has no such two products", f"{path}/scores/MatMul", KEY)
    for path, attention in found.items() if subject.promises else ():
        if attention.in_fp8 and path not in promised:
            yield Hit("it is in FP8, which nothing promises", name_of(attention.scores), KEY)
    for attention, operand in _rounded(subject):
        own = f"{attention.path}.{operand.name}_scale"
        if attention.path in promised and operand.name != "softmax" and subject.owner(operand.scale) != own:
            yield Hit(f"reads {subject.owner(operand.scale)}; expected {own}", _quantizer(operand), operand.scale)


RULES = (
    attention_operand,
    attention_scale_value,
    attention_scale_constant,
    attention_softmax_scale,
    attention_dequantize_scale,
    promised_attention,
)


def _promised(subject: Subject) -> tuple[str, ...]:
    value = subject.declared(KEY)
    paths = value.get("fp8") if isinstance(value, dict) else None
    return tuple(str(path) for path in paths) if isinstance(paths, list) else ()


def _rounded(subject: Subject) -> Iterator[tuple[Attention, Operand]]:
    """Yield each operand of an attention that is in FP8."""
    for attention in find_attentions(subject.graph):
        for operand in attention.operands:
            if operand.quantize is not None:
                yield attention, operand


def _quantizer(operand: Operand) -> str:
    assert operand.quantize is not None
    return name_of(operand.quantize)
