"""Gates on attention in FP8: what is promised is there, and each, fed with the reference's operands, does the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from fp4trt.errors import BadGraph
from onnx_functions.graph.attentions import Attention, Operand, find_attentions, promised_attentions
from onnx_functions.graph.cut import cut
from onnx_functions.graph.index import Index
from onnx_functions.simulation.simulate import runtime_session, simulate
from onnx_functions.validation.verdict import FloatArray, Gate, gate_of_offenders, relative_l2

__all__ = [
    "ATTENTION_LIMIT",
    "AttentionForced",
    "AttentionTeacher",
    "attention_gates",
    "attention_promise_gate",
    "compare_attention",
]

ATTENTION_LIMIT: Final = 2e-2
"""Relative L2 of an attention's output: a score that rounds the other way in BF16 moves a few E4M3 probabilities."""


@dataclass(frozen=True)
class AttentionTeacher:
    """What the reference says of one attention.

    Attributes:
        operands: q, k and v, [B, H, L, D] each, before any rounding; FP32 that BF16 can hold.
        codes: of the three, E4M3 values as FP32.
        output: [B, H, L, D], likewise.
    """

    operands: Mapping[str, FloatArray]
    codes: Mapping[str, FloatArray]
    output: FloatArray


@dataclass(frozen=True)
class AttentionForced:
    """One attention's comparison: how many E4M3 codes were compared and differ, and its output's relative L2 error."""

    path: str
    compared: int
    differing: int
    error: float


def compare_attention(
    model: onnx.ModelProto, directory: Path, attention: Attention, teacher: AttentionTeacher
) -> AttentionForced:
    """Run one attention in ONNX Runtime on the reference's operands; compare codes and output.

    Raises:
        BadGraph: an operand is not in FP8.
    """
    if attention.missing:
        raise BadGraph(f"{' and '.join(attention.missing)} of {attention.path} not in FP8; export the graph again")
    operands = {operand.name: operand for operand in attention.operands if operand.name in teacher.operands}
    places = {_quantized(operand): f"{attention.path}:{name}" for name, operand in operands.items()}
    feeds = {places[_quantized(operand)]: _laid(operand, teacher.operands[name]) for name, operand in operands.items()}
    codes = [_codes(operand) for operand in operands.values()]
    session = runtime_session(simulate(cut(model, places, [*codes, attention.gives])), directory)
    *found, output = session.run(None, feeds)
    expected = [_laid(operand, teacher.codes[name]) for name, operand in operands.items()]
    differing = sum(_unequal(values, wanted) for values, wanted in zip(found, expected, strict=True))
    compared = sum(wanted.size for wanted in expected)
    return AttentionForced(attention.path, compared, differing, relative_l2(output, teacher.output))


def _quantized(operand: Operand) -> str:
    assert operand.quantize is not None
    return str(operand.quantize.input[0])


def _codes(operand: Operand) -> str:
    assert operand.quantize is not None
    return str(operand.quantize.output[0])


def _laid(operand: Operand, values: FloatArray) -> FloatArray:
    """Return values as the quantizer has them: a key transposed already, unless that happens behind it."""
    assert operand.dequantize is not None
    turned = operand.name == "k" and operand.tensor == operand.dequantize.output[0]
    return np.ascontiguousarray(values.swapaxes(-1, -2) if turned else values)


def _unequal(found: FloatArray, expected: FloatArray) -> int:
    if found.shape != expected.shape:
        return max(found.size, expected.size)
    return int((found.view(np.uint32) != expected.view(np.uint32)).sum())


def attention_promise_gate(model: onnx.ModelProto, held: Collection[str] | None) -> Gate | None:
    """Check that metadata, checkpoint and nodes speak of the same attentions in FP8; None where none of them does.

    Args:
        model: the deployable graph.
        held: module paths of the attentions that the checkpoint has in FP8; None where it does not say.
    """
    promised = promised_attentions(model)
    written = {attention.path: attention for attention in find_attentions(Index(model))}
    known = dict.fromkeys((*promised, *(held or ()), *(path for path, one in written.items() if one.in_fp8)))
    if not known:
        return None
    offenders = [(path, what) for path in known if (what := _broken(path, promised, written.get(path), held))]
    told = f"{len(known)} attentions in FP8, as promised"
    return gate_of_offenders("attention promise", offenders, len(offenders), 0, told, count=len(known))


def _broken(
    path: str, promised: Collection[str], written: Attention | None, held: Collection[str] | None
) -> str | None:
    if path not in promised:
        return "it is in FP8, the graph does not promise it"
    if held is not None and path not in held:
        return "the graph promises it in FP8, the checkpoint has no scales for it"
    if written is None:
        return "the graph promises it in FP8, and has no such two products"
    return f"its {' and '.join(written.missing)} not in FP8" if written.missing else None


def attention_gates(results: Iterable[AttentionForced], limit: float = ATTENTION_LIMIT) -> Iterator[Gate]:
    """Yield the gates on attentions that were run: no code may differ, and no output by more than rounding does."""
    rows = sorted(results, key=lambda row: -row.error)
    offenders = [(row.path, f"{row.differing} of {row.compared} codes differ") for row in rows if row.differing]
    compared, differing = sum(row.compared for row in rows), sum(row.differing for row in rows)
    told = f"0 of {compared} codes of {len(rows)} queries, keys and values differ"
    yield gate_of_offenders("attention codes", offenders, differing, 0, told, count=compared)
    offenders = [(row.path, f"relative L2 error {row.error:.3g}") for row in rows if not row.error <= limit]
    worst, where = (rows[0].error, rows[0].path) if rows else (0.0, "none")
    told = f"largest relative L2 error of {len(rows)} attentions {worst:.2g} ({where})"
    yield gate_of_offenders("attentions", offenders, worst, limit, told, count=len(rows))
