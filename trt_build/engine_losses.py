"""What an engine with several optimization profiles covers: what is lost in any of them is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from trt_build.attention_coverage import AttentionCoverage, LostAttention
from trt_build.coverage import Coverage, SixteenBit

__all__ = ["attentions_of_all", "coverage_of_all"]

Lost = TypeVar("Lost", SixteenBit, LostAttention)


def coverage_of_all(profiles: Sequence[Coverage]) -> Coverage:
    """Return the coverage of an engine: the first profile's kernels, and lost is what is lost in any profile."""
    return replace(profiles[0], lost=_in_any([each.lost for each in profiles]))


def attentions_of_all(profiles: Sequence[AttentionCoverage]) -> AttentionCoverage:
    """Return the attentions of an engine: fused are those that are so in every profile."""
    fused = {path: kernel for path, kernel in profiles[0].fused.items() if all(path in each.fused for each in profiles)}
    return replace(profiles[0], fused=fused, lost=_in_any([each.lost for each in profiles]))


def _in_any(lost: Sequence[Iterable[Lost]]) -> tuple[Lost, ...]:
    """Return what any of several profiles has lost, each with the first one's reason; of one profile as it is."""
    if len(lost) == 1:
        return tuple(lost[0])
    found: dict[str, Lost] = {}
    for number, items in enumerate(lost):
        for item in items:
            name = item.linear if isinstance(item, SixteenBit) else item.attention
            found.setdefault(name, replace(item, reason=f"in profile {number}: {item.reason}"))
    return tuple(found.values())
