"""Several quantized checkpoints against their BF16 reference: the same prompts and noise, pictures and numbers."""

from __future__ import annotations

__all__: list[str] = []
