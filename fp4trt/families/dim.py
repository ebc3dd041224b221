"""Symbolic dimensions of a graph: what each counts, and the bounds that an optimization profile may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

__all__ = ["BOUNDS", "OPTIONS", "TOKENS", "Dim", "Kind", "out_of_order"]

Kind = Literal["batch", "image_tokens", "text_tokens"]

BOUNDS: Final[Mapping[str, tuple[str, ...]]] = {
    "batch": ("min", "default", "max"),
    "text_tokens": ("min", "default", "max"),
    "image_tokens": ("min_resolution", "default_resolution", "max_resolution", "pixels_per_token"),
}
"""What bounds a dimension of each kind: the range in order, then what it is counted in."""

OPTIONS: Final[Mapping[str, str]] = {"batch": "--batch", "image_tokens": "--resolution", "text_tokens": "--text"}
"""The option of ``fp4trt build`` that sets a dimension of each kind."""

TOKENS: Final = ("image_tokens", "text_tokens")
"""The kinds that an attention's sequence consists of."""


@dataclass(frozen=True)
class Dim:
    """One symbolic dimension of the graph, with the bounds that an optimization profile may take.

    A ``batch`` or ``text_tokens`` dimension is bounded directly; an ``image_tokens`` dimension through the resolution
    in pixels: a picture of H x W pixels has (H / pixels_per_token) * (W / pixels_per_token) tokens.
    """

    kind: Kind
    min: int | None = None
    max: int | None = None
    default: int | None = None
    pixels_per_token: int | None = None
    min_resolution: int | None = None
    max_resolution: int | None = None
    default_resolution: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens by default."""
        if self.default_resolution is None or self.pixels_per_token is None:
            return self.default or 1
        return (self.default_resolution // self.pixels_per_token) ** 2

    def as_dict(self) -> dict[str, int | str]:
        """Return the fields that this kind of dimension has, as they stand in the graph's metadata."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def out_of_order(values: Mapping[str, Any], keys: tuple[str, ...]) -> bool:
    """Return whether some of a dimension's bounds are no positive numbers, or its range is not in order."""
    numbers = [values.get(key) for key in keys]
    whole = [value for value in numbers if type(value) is int and value > 0]
    return len(whole) < len(numbers) or whole[:3] != sorted(whole[:3])
