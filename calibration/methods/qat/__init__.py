"""Quantization-aware training by distillation: a BF16 teacher, an NVFP4 student, a checkpoint to start from."""

from __future__ import annotations

__all__: list[str] = []
