"""How the linears and attentions of a quantized checkpoint are stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from fp4trt.families import Family

__all__ = ["UNQUANTIZED", "Account", "Format", "StoredForm"]

Format = str
"""Name of a number format, or :data:`UNQUANTIZED`."""

UNQUANTIZED: Final = "16-bit"
"""Format of a weight in BF16, FP16 or FP32."""


@dataclass(frozen=True)
class StoredForm:
    """How a linear is stored.

    Attributes:
        format: of its weight.
        shape: [N, K], in elements.
        rank: of its low-rank branch, 0 without one.
        smoothed: whether its input is scaled by channel first.
    """

    format: Format
    shape: tuple[int, int]
    rank: int
    smoothed: bool


@dataclass(frozen=True)
class Account:
    """What a quantized checkpoint holds, every tensor of it.

    Attributes:
        family: of the model.
        linears: module path of every linear to how it is stored, those that the family quantizes first, in graph order.
        attentions: module path of each attention in FP8 to scale (of :data:`fp4trt.account.ATTENTION_SCALES` or
            :data:`fp4trt.account.OUTPUT_SCALE`) to the tensor that gives it: the scale itself, or ModelOpt's amax.
        groups: all linears by shared input.
        family_state: names of the tensors that a plain checkpoint has.
        meanings: name of every tensor to what it is, in words.
        config: the checkpoint's.
    """

    family: Family
    config: Mapping[str, Any]
    groups: tuple[tuple[str, ...], ...]
    family_state: Collection[str]
    linears: Mapping[str, StoredForm]
    attentions: Mapping[str, Mapping[str, str]]
    meanings: Mapping[str, str]

    def of_format(self, kind: Format) -> tuple[str, ...]:
        """Return the linears in a format."""
        return tuple(path for path, form in self.linears.items() if form.format == kind)

    @cached_property
    def altered(self) -> tuple[str, ...]:
        """The linears with a branch or a scaled input, whatever the format of their weight."""
        return tuple(path for path, form in self.linears.items() if form.rank or form.smoothed)
