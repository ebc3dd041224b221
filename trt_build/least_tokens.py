"""The shortest sequence of a graph whose attention is in FP8: TensorRT fuses it only from 32 tokens on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from fp4trt.errors import BadProfileError
from fp4trt.families.dim import OPTIONS, TOKENS

__all__ = ["LEAST_TOKENS", "raised", "require_tokens"]

LEAST_TOKENS: Final = 32
"""Image and text tokens, measured with TensorRT-RTX 1.7.1: with a profile that begins at 31 the two products of
an attention become two GEMMs of nine kernels, with 32 one kernel."""

Extents = dict[str, tuple[int, int, int]]
Dimensions = tuple[int | str | None, ...]
Symbols = Mapping[str, Mapping[str, Any]]


def raised(extents: Extents, symbols: Symbols, given: Collection[str]) -> tuple[Extents, tuple[str, ...]]:
    """Return extents whose minima have enough tokens together, where a symbol that nobody gave can make up for it.

    Args:
        extents: minimum, optimum and maximum of each symbol.
        symbols: as the metadata declare them.
        given: the symbols whose extents the user named, which stay.

    Returns:
        The extents, and a line for each change.
    """
    for name in sorted(_tokens(symbols), key=lambda symbol: str(symbols[symbol]["kind"])):  # the picture first
        lacking = LEAST_TOKENS - sum(extents[other][0] for other in _tokens(symbols))
        low, best, high = extents[name]
        if lacking <= 0 or name in given:
            continue
        least, said = _enough(symbols[name], low + lacking)
        if least <= high:
            line = f"attention in FP8 needs {LEAST_TOKENS} tokens or more: the profile begins at {said}"
            return {**extents, name: (least, max(best, least), high)}, (line,)
    return extents, ()


def require_tokens(minima: Mapping[str, Sequence[int]], dimensions: Mapping[str, Dimensions], symbols: Symbols) -> None:
    """Refuse a profile that begins below :data:`LEAST_TOKENS`.

    Args:
        minima: the least shape of each input.
        dimensions: of each input.
        symbols: as the metadata declare them; a third-party graph has none, and is not refused here.

    Raises:
        BadProfileError: saying what to give.
    """
    sizes = [pair for name, shape in minima.items() for pair in zip(dimensions[name], shape, strict=True)]
    known = [name for name in _tokens(symbols) if name in dict(sizes)]
    tokens = {name: min(size for found, size in sizes if found == name) for name in known}
    total = sum(tokens.values())
    if not tokens or total >= LEAST_TOKENS:
        return
    enough = (_enough(symbols[name], LEAST_TOKENS - total + low)[1] for name, low in tokens.items())
    found = ", ".join(f"{name} {low}" for name, low in tokens.items())
    raise BadProfileError(
        f"attention in FP8 needs {LEAST_TOKENS} tokens of picture and text together, the profile begins at {total} "
        f"({found}); give at least {' or '.join(enough)}"
    )


def _tokens(symbols: Symbols) -> list[str]:
    return [name for name, symbol in symbols.items() if symbol["kind"] in TOKENS]


def _enough(symbol: Mapping[str, Any], tokens: int) -> tuple[int, str]:
    """Return the least value of a symbol that is so many tokens or more, and the option that gives it."""
    option = OPTIONS[symbol["kind"]][0]
    if symbol["kind"] == "text_tokens":
        return tokens, f"{option} {tokens}"
    side = math.isqrt(tokens - 1) + 1
    return side * side, f"{option} {side * int(symbol['pixels_per_token'])}"
