"""The built-in model's text encoder, which needs no weights: a word is the bits of its hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

__all__ = ["MAX_WORDS", "WIDTH", "WORDS", "embed_prompts", "embed_word", "words_of"]

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WIDTH = 64
MAX_WORDS = 8


def embed_word(word: str) -> torch.Tensor:
    """Return the first 64 bits of the word's SHA-256 as FP32 [64]: +1 for a set bit, -1 for a clear one."""
    digest = hashlib.sha256(word.encode("utf-8")).digest()
    bits = [(digest[i // 8] >> (7 - i % 8)) & 1 for i in range(WIDTH)]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1


def embed_prompts(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed prompts of up to eight words.

    Returns:
        (tokens FP32 [B, 8, 64], pooled FP32 [B, 64]). Unused tokens hold the empty word's embedding. The
        pooled one is the sum of the used words' over the root of their number, so its variance stays one.

    Raises:
        ValueError: a prompt with no word or with more than eight.
    """
    tokens = embed_word("").repeat(len(prompts), MAX_WORDS, 1)
    pooled = torch.zeros(len(prompts), WIDTH)
    for row, prompt in enumerate(prompts):
        words = prompt.split()
        if not 1 <= len(words) <= MAX_WORDS:
            raise ValueError(f"the prompt {prompt!r} has {len(words)} words: expected 1 to {MAX_WORDS}")
        embedded = torch.stack([embed_word(word) for word in words])
        tokens[row, : len(words)] = embedded
        pooled[row] = embedded.sum(0) / math.sqrt(len(words))
    return tokens, pooled


def words_of(labels: Sequence[int]) -> list[str]:
    """Return each label's prompt, ``3`` -> ``"three"``. Raises ValueError for a label outside 0..9."""
    for label in labels:
        if not 0 <= int(label) < len(WORDS):
            raise ValueError(f"label {int(label)}: expected a digit, 0 to 9")
    return [WORDS[int(label)] for label in labels]
