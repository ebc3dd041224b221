"""Watch what torch's attention is given: the largest magnitudes of query, key and value, the scales of FP8."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from calibration.formats.input_quantizers import Amax, checked
from fp4trt.errors import BadAmax

__all__ = ["ATTENTION", "OperandAmax", "checked_attentions", "operands_of"]

ATTENTION: Final = nn.functional.scaled_dot_product_attention
"""What every attention calls; kept here because ModelOpt puts something in its place that calls it in turn."""

_OPERANDS: Final = ("query", "key", "value")


def operands_of(attentions: Iterable[str]) -> tuple[str, ...]:
    """Return ``A.q``, ``A.k`` and ``A.v`` of each attention A, as amax values name what its two products read."""
    return tuple(f"{path}.{operand}" for path in attentions for operand in ("q", "k", "v"))


def checked_attentions(amax: Mapping[str, Any], attentions: Sequence[str]) -> Amax:
    """Return the amax values of these attentions' operands in their order.

    Raises:
        BadAmax: one is missing, or gives no scale, naming the operand.
    """
    operands = operands_of(attentions)
    for operand in operands:
        if operand not in amax:
            raise BadAmax(
                f"no amax for {operand}, which FP8 attention needs: the calibration file is older than FP8 attention; "
                "run fp4trt calibrate again, or take a recipe with attention: bf16"
            )
    return checked(amax, operands)


class OperandAmax(TorchFunctionMode):
    """While it is entered, measures what attention is given; computes nothing otherwise.

    Args:
        attentions: module paths in the order in which they run; the same order is expected again and again. With none
            it measures nothing.
    """

    def __init__(self, attentions: Sequence[str]) -> None:
        super().__init__()
        self._watches = bool(attentions)
        self._next = itertools.cycle(attentions)
        self._found: dict[str, torch.Tensor] = {}

    @property
    def amax(self) -> Amax:
        """The amax values so far, ``A.q``, ``A.k`` and ``A.v`` of each attention A that ran; q and k with positions."""
        return {operand: float(value) for operand, value in self._found.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(_OPERANDS, args, strict=False)) | (kwargs or {})
        # On the meta device a block is asked for shapes alone.
        if func is ATTENTION and self._watches and not given[_OPERANDS[0]].is_meta:
            for operand, name in zip(operands_of([next(self._next)]), _OPERANDS, strict=True):
                largest = given[name].abs().amax().float()  # NaN stays
                self._found[operand] = torch.maximum(largest, self._found.get(operand, largest))
        return func(*args, **(kwargs or {}))
