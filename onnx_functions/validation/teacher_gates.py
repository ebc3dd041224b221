"""Gates on single operations: every quantizer and every linear fed with the reference's own input.

Values of two correct runtimes drift apart over a network, because one code that falls the other way is a
whole step. Fed with the same input they must agree: quantizers exactly, products to the rounding of a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx

from onnx_functions.graph.linears import Linear, Quantizer
from onnx_functions.simulation.simulate import runtime_session, teacher_forced
from onnx_functions.validation.verdict import FloatArray, Gate, gate_of_offenders, relative_l2

__all__ = [
    "LINEAR_LIMIT",
    "MODULE_LIMIT",
    "QUANTIZED_LINEAR_LIMIT",
    "Teacher",
    "TeacherForced",
    "block_of",
    "compare_block",
    "linear_gate",
    "module_gate",
    "quantizer_gate",
]

LINEAR_LIMIT: Final = 1e-4
"""Relative L2 of a product whose operands are equal: only the order of the FP32 sum differs."""

MODULE_LIMIT: Final = 1e-2
"""Relative L2 of a product against a BF16 output: its rounding, and that of the scales where the graph rounds them."""

QUANTIZED_LINEAR_LIMIT: Final = 0.25
"""Relative L2 of a product against the 16-bit one: weight and activation error together are .13 on normal
data."""


@dataclass(frozen=True)
class Teacher:
    """What the reference says of one block's linears.

    Attributes:
        inputs: module path to the input [..., K] that the reference's linear had, as FP32: values that BF16 can hold,
            but for a linear that is computed in FP32.
        quantize: (path, input) to E2M1 values [..., K] and block scales [..., K / 16], or to E4M3 values [..., K]
            alone, all FP32.
        product: (path, input) to the linear's FP32 output [..., N], bias included, not rounded.
        outputs: module path to what the reference's own module gave, rounded to BF16.
        factors: of slots for LoRAs, by the graph's inputs, FP32 that BF16 can hold.
    """

    inputs: Mapping[str, FloatArray]
    quantize: Callable[[str, FloatArray], tuple[FloatArray, ...]]
    product: Callable[[str, FloatArray], FloatArray]
    outputs: Mapping[str, FloatArray]
    factors: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherForced:
    """One linear's comparison.

    Attributes:
        linear: which one.
        compared: how many codes and block scales.
        differing: how many of them differ; None where it has no activation quantizer.
        error: relative L2 of its product against the FP32 product of the same operands.
        module_error: against what the reference's module gave in BF16.
    """

    linear: Linear
    compared: int
    differing: int | None
    error: float
    module_error: float


def block_of(path: str, blocks: Collection[str]) -> str:
    """Return which of some blocks a path lies in, such as `transformer_blocks.3`; empty outside them."""
    ends = (index for index, letter in enumerate(path) if letter == ".")
    return next((path[:end] for end in ends if path[:end] in blocks), "")


def compare_block(
    model: onnx.ModelProto, directory: Path, linears: Sequence[Linear], teacher: Teacher
) -> Iterator[TeacherForced]:
    """Run some linears in ONNX Runtime, each on the reference's input; compare codes, scales, products."""
    session = runtime_session(teacher_forced(model, linears), directory)
    feeds = {f"{linear.head}:x": teacher.inputs[linear.path] for linear in linears}
    slots = (linear.slot for linear in linears if linear.slot is not None)
    feeds |= {factor: teacher.factors[factor] for slot in slots for factor in slot.factors}
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(names, feeds), strict=True))
    counted: dict[str, tuple[int, int]] = {}
    for linear in linears:
        x = teacher.inputs[linear.path]
        quantizer = linear.quantizer
        if quantizer is not None and quantizer.node not in counted:
            counted[quantizer.node] = _differing(found, quantizer, teacher.quantize(linear.path, x))
        compared, differing = counted[quantizer.node] if quantizer else (0, None)
        error = relative_l2(found[linear.output], teacher.product(linear.path, x))
        module_error = relative_l2(found[linear.output], teacher.outputs[linear.path])
        yield TeacherForced(linear, compared, differing, error, module_error)


def _differing(
    found: Mapping[str, FloatArray], quantizer: Quantizer, wanted: tuple[FloatArray, ...]
) -> tuple[int, int]:
    """Return how many codes and block scales were compared, and how many differ, signs of zeros included."""
    total = wrong = 0
    names = [name for name in (quantizer.codes, quantizer.block_scales) if name]
    if len(names) != len(wanted):  # of another format than the reference's
        return wanted[0].size, wanted[0].size
    for name, expected in zip(names, wanted, strict=True):
        total += expected.size
        wrong += _unequal(found[name], expected)
    return total, wrong


def _unequal(found: FloatArray, expected: FloatArray) -> int:
    if found.shape != expected.shape:
        return max(found.size, expected.size)
    bits: list[npt.NDArray[np.uint32]] = [np.ascontiguousarray(a).view(np.uint32) for a in (found, expected)]
    return int((bits[0] != bits[1]).sum())


def quantizer_gate(results: Iterable[TeacherForced], promised: Sequence[str]) -> Gate:
    """Check that no activation code or block scale differs, and no promised linear lacks its quantizer."""
    offenders: dict[str, str] = {}
    seen: dict[str, tuple[int, int]] = {}
    without = set(promised)
    for result in results:
        quantizer = result.linear.quantizer
        if quantizer is None or result.differing is None:
            continue
        without.discard(result.linear.path)
        seen[quantizer.node] = (result.compared, result.differing)
        if result.differing:
            what = (
                f"{result.differing} of {result.compared} codes and block scales differ (input of {result.linear.path})"
            )
            offenders.setdefault(quantizer.node, what)
    offenders.update({f"{path}/MatMul": "has no activation quantizer" for path in promised if path in without})
    compared, differing = (sum(pair[i] for pair in seen.values()) for i in (0, 1))
    told = f"0 of {compared} codes and block scales of {len(seen)} quantizers differ"
    return gate_of_offenders("quantizers", list(offenders.items()), differing, 0, told, count=compared)


def linear_gate(results: Iterable[TeacherForced], limit: float = LINEAR_LIMIT) -> Gate:
    """Check every linear's product, on the reference's input, against the FP32 product of the same operands."""
    return _error_gate("linears", [(result.error, result.linear) for result in results], limit)


def module_gate(results: Iterable[TeacherForced], limit: float = MODULE_LIMIT) -> Gate:
    """Check every linear's product, on the reference's input, against what torch's own module gave."""
    return _error_gate("modules", [(result.module_error, result.linear) for result in results], limit)


def _error_gate(name: str, measured: Iterable[tuple[float, Linear]], limit: float) -> Gate:
    rows = sorted(measured, key=lambda row: -row[0])
    offenders = [(linear.matmul, f"relative L2 error {error:.3g}") for error, linear in rows if not error <= limit]
    worst, where = (rows[0][0], rows[0][1].path) if rows else (0.0, "none")
    told = f"largest relative L2 error of {len(rows)} linears {worst:.2g} ({where})"
    return gate_of_offenders(name, offenders, worst, limit, told, count=len(rows))
