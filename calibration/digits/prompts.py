"""The built-in model's words, and its text encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.digits.description import DESCRIPTION, WORDS
from calibration.pixel_space import prompts as encoder

__all__ = ["MAX_WORDS", "WIDTH", "WORDS", "embed_prompts", "embed_word", "words_of"]

WIDTH = DESCRIPTION.text.width
MAX_WORDS = DESCRIPTION.text.words


def embed_word(word: str) -> torch.Tensor:
    """Return the first 64 bits of the word's SHA-256 as FP32 [64]: +1 for a set bit, -1 for a clear one."""
    return encoder.embed_word(word, WIDTH)


def embed_prompts(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed prompts of up to eight words.

    Returns:
        (tokens FP32 [B, 8, 64], pooled FP32 [B, 64]), as :func:`calibration.pixel_space.prompts.embed_prompts`.

    Raises:
        ValueError: a prompt with no word or with more than eight.
    """
    return encoder.embed_prompts(prompts, MAX_WORDS, WIDTH)


def words_of(labels: Sequence[int]) -> list[str]:
    """Return each label's prompt, ``3`` -> ``"three"``. Raises ValueError for a label outside 0..9."""
    for label in labels:
        if not 0 <= int(label) < len(WORDS):
            raise ValueError(f"label {int(label)}: expected a digit, 0 to 9")
    return [WORDS[int(label)] for label in labels]
