"""Which tokens of a text are seen, as a graph takes it: a tensor that every call has."""

from __future__ import annotations

import torch

__all__ = ["seen_text"]


def seen_text(mask: torch.Tensor | None, text: torch.Tensor) -> torch.Tensor:
    """Return which tokens of a text are no padding, bool [B, T].

    Args:
        mask: bool, or numbers of which 0 hides, [B, T or more]; None, as pipelines give it, where all are seen.
        text: [B, T, ...].
    """
    if mask is None:
        return text.new_ones(text.shape[:2], dtype=torch.bool)
    return mask[:, : text.shape[1]] != 0
