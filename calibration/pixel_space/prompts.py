"""A text encoder that needs no weights: a word is the bits of its hash."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

__all__ = ["embed_prompts", "embed_word"]


def embed_word(word: str, width: int) -> torch.Tensor:
    """Return the first bits of the word's SHA-256 as FP32 [width]: +1 for a set bit, -1 for a clear one."""
    digest = hashlib.sha256(word.encode("utf-8")).digest()
    bits = [(digest[i // 8] >> (7 - i % 8)) & 1 for i in range(width)]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1


def embed_prompts(prompts: Sequence[str], words: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed prompts of up to ``words`` words.

    Returns:
        (tokens FP32 [B, words, width], pooled FP32 [B, width]). Unused tokens hold the empty word's embedding. The
        pooled one is the sum of the used words' over the root of their number, so its variance stays one.

    Raises:
        ValueError: a prompt with no word or with too many.
    """
    tokens = embed_word("", width).repeat(len(prompts), words, 1)
    pooled = torch.zeros(len(prompts), width)
    for row, prompt in enumerate(prompts):
        used = prompt.split()
        if not 1 <= len(used) <= words:
            raise ValueError(f"the prompt {prompt!r} has {len(used)} words: expected 1 to {words}")
        embedded = torch.stack([embed_word(word, width) for word in used])
        tokens[row, : len(used)] = embedded
        pooled[row] = embedded.sum(0) / math.sqrt(len(used))
    return tokens, pooled
