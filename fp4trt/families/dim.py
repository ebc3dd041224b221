"""Symbolic dimensions of a graph: what each counts, and the bounds that an optimization profile may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

__all__ = ["BOUNDS", "OPTIONS", "TOKENS", "Dim", "Kind", "out_of_order"]

Kind = Literal[
    "batch",
    "image_tokens",
    "text_tokens",
    "video_tokens",
    "audio_tokens",
    "image_rows",
    "image_columns",
    "size",
    "lora_rank",
]

_COUNT: Final = ("min", "default", "max")
_PICTURE: Final = ("min_resolution", "default_resolution", "max_resolution", "pixels_per_token")
_LENGTH: Final = ("min_frames", "default_frames", "max_frames", "frames_per_token")

BOUNDS: Final[Mapping[str, tuple[tuple[str, ...], ...]]] = {
    "batch": (_COUNT,),
    "text_tokens": (_COUNT,),
    "image_tokens": (_PICTURE,),
    "video_tokens": (_PICTURE, _LENGTH),
    "audio_tokens": (_COUNT,),
    "image_rows": (_PICTURE,),
    "image_columns": (_PICTURE,),
    "size": (_COUNT,),
    "lora_rank": (_COUNT,),
}
"""What bounds a dimension of each kind: ranges in order, each followed by what it is counted in."""

OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "batch": ("--batch",),
    "image_tokens": ("--resolution",),
    "text_tokens": ("--text",),
    "video_tokens": ("--resolution", "--frames"),
    "audio_tokens": ("--audio",),
    "image_rows": ("--resolution",),
    "image_columns": ("--resolution",),
    "size": ("--shape",),
    "lora_rank": ("--shape",),
}
"""The options of ``fp4trt build`` that set a dimension of each kind."""

TOKENS: Final = ("image_tokens", "video_tokens", "text_tokens")
"""The kinds that an attention's sequence consists of."""


@dataclass(frozen=True)
class Dim:
    """One symbolic dimension of the graph, with the bounds that an optimization profile may take.

    A dimension of the kind ``batch``, ``text_tokens``, ``audio_tokens``, ``size`` or ``lora_rank`` (of all slots for
    LoRAs, 0 for none) is bounded directly; one of ``image_tokens`` through the resolution in pixels: a picture of H x W
    pixels has (H / pixels_per_token) * (W / pixels_per_token) tokens. One of ``video_tokens`` has such a picture's
    tokens 1 + (frames - 1) / frames_per_token times; its least and largest resolution bound the area of a frame, not
    its sides. One of ``image_rows`` or ``image_columns`` is H / pixels_per_token or W / pixels_per_token.
    ``references`` says whether pictures to refer to, or to edit, are tokens of the same sequence, behind those of the
    picture that is made.
    """

    kind: Kind
    min: int | None = None
    max: int | None = None
    default: int | None = None
    pixels_per_token: int | None = None
    min_resolution: int | None = None
    max_resolution: int | None = None
    default_resolution: int | None = None
    frames_per_token: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    default_frames: int | None = None
    references: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens by default."""
        return self._count(self.default, self.default_resolution, self.default_frames)

    @property
    def most(self) -> int:
        """Largest number of tokens, or of what it counts; of a picture's, without pictures to refer to."""
        return self._count(self.max, self.max_resolution, self.max_frames)

    def _count(self, number: int | None, resolution: int | None, frames: int | None) -> int:
        if resolution is None or self.pixels_per_token is None:
            return number or 1
        side = resolution // self.pixels_per_token
        if self.kind in ("image_rows", "image_columns"):
            return side
        picture = side**2
        if frames is None or self.frames_per_token is None:
            return picture
        return picture * (1 + (frames - 1) // self.frames_per_token)

    def as_dict(self) -> dict[str, int | str]:
        """Return the fields that this kind of dimension has, as they stand in the graph's metadata."""
        found = {key: value for key, value in asdict(self).items() if value is not None}
        has_references = self.kind in TOKENS and self.kind != "text_tokens"
        return found if has_references else {key: found[key] for key in found if key != "references"}


def out_of_order(values: Mapping[str, Any], kind: str) -> bool:
    """Return whether some of a dimension's bounds are no positive numbers, or a range is not in order.

    The rank of LoRAs may be 0, but for its maximum.
    """
    for keys in BOUNDS[kind]:
        numbers = [values.get(key) for key in keys]
        least = 0 if kind == "lora_rank" else 1
        whole = [value for value in numbers if type(value) is int and value >= least]
        if len(whole) < len(numbers) or whole[:3] != sorted(whole[:3]) or whole[-1:] == [0]:
            return True
    return False
