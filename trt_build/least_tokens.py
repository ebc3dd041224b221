"""The fewest keys of an attention in FP8: TensorRT fuses it only from 32 on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from fp4trt.errors import BadProfileError
from fp4trt.families.dim import OPTIONS, TOKENS

__all__ = ["LEAST_TOKENS", "raised", "require_tokens"]

LEAST_TOKENS: Final = 32
"""Keys, however few queries there are; measured with TensorRT-RTX 1.7.1: with a profile that begins at 31 the two
products of an attention become two GEMMs of nine kernels, with 32 one kernel."""

_WORDS: Final = {
    "image_tokens": "picture", "video_tokens": "video", "text_tokens": "text", "audio_tokens": "sound"
}  # fmt: skip

Extents = dict[str, tuple[int, int, int]]
Dimensions = tuple[int | str | None, ...]
Symbols = Mapping[str, Mapping[str, Any]]
Keys = Collection[Sequence[str]]
"""Symbols that add up to the keys of an attention, of each that differs; none where it is not known: then one attention
reads all tokens of picture, video and text."""


def raised(
    extents: Extents, symbols: Symbols, given: Collection[str], keys: Keys = ()
) -> tuple[Extents, tuple[str, ...]]:
    """Return extents whose minima have enough keys, where a symbol that nobody gave can make up for it.

    Args:
        extents: minimum, optimum and maximum of each symbol.
        symbols: as the metadata declare them.
        given: the symbols whose extents the user named, which stay.
        keys: of the attentions in FP8.

    Returns:
        The extents, and a line for each change.
    """
    found, lines = dict(extents), []
    for names in keys or [_joined(symbols)]:
        for name in sorted(names, key=lambda symbol: symbols[symbol]["kind"] == "text_tokens"):
            lacking = LEAST_TOKENS - sum(found[other][0] for other in names)
            low, best, high = found[name]
            if lacking <= 0 or name in given:
                continue
            least, said = _enough(name, symbols[name], low + lacking)
            if least <= high:
                found[name] = (least, max(best, least), high)
                lines.append(f"attention in FP8 needs {LEAST_TOKENS} tokens or more: the profile begins at {said}")
    return found, tuple(lines)


def require_tokens(
    minima: Mapping[str, Sequence[int]], dimensions: Mapping[str, Dimensions], symbols: Symbols, keys: Keys = ()
) -> None:
    """Refuse a profile that begins below :data:`LEAST_TOKENS`.

    Args:
        minima: the least shape of each input.
        dimensions: of each input.
        symbols: as the metadata declare them; a third-party graph has none, and is not refused here.
        keys: of the attentions in FP8.

    Raises:
        BadProfileError: saying what to give.
    """
    sizes = [pair for name, shape in minima.items() for pair in zip(dimensions[name], shape, strict=True)]
    for names in keys or [_joined(symbols)]:
        known = [name for name in names if name in dict(sizes)]
        tokens = {name: min(size for found, size in sizes if found == name) for name in known}
        total = sum(tokens.values())
        if tokens and total < LEAST_TOKENS:
            raise _too_few(tokens, total, symbols)


def _too_few(tokens: Mapping[str, int], total: int, symbols: Symbols) -> BadProfileError:
    enough = (_enough(name, symbols[name], LEAST_TOKENS - total + low)[1] for name, low in tokens.items())
    found = ", ".join(f"{name} {low}" for name, low in tokens.items())
    words = " and ".join(_WORDS.get(symbols[name]["kind"], name) for name in tokens)
    return BadProfileError(
        f"attention in FP8 needs {LEAST_TOKENS} tokens of {words}{' together' if len(tokens) > 1 else ''}, the profile "
        f"begins at {total} ({found}); give at least {' or '.join(enough)}"
    )


def _joined(symbols: Symbols) -> list[str]:
    return [name for name, symbol in symbols.items() if symbol["kind"] in TOKENS]


def _enough(name: str, symbol: Mapping[str, Any], tokens: int) -> tuple[int, str]:
    """Return the least value of a symbol that is so many tokens or more, and the option that gives it."""
    option = OPTIONS[symbol["kind"]][0]
    if option == "--shape":
        return tokens, f"{option} {name}={tokens}"
    if "pixels_per_token" not in symbol:
        return tokens, f"{option} {tokens}"
    side = math.isqrt(tokens - 1) + 1
    return side * side, f"{option} {side * int(symbol['pixels_per_token'])}"
