"""Let a gradient go straight through a rounding (Bengio, Léonard and Courville 2013, arXiv:1308.3432)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["as_bfloat16", "straight_through"]


class _Rounded(torch.autograd.Function):
    """``rounded(value)`` forwards, the gradient of ``value`` itself backwards."""

    @staticmethod
    def forward(_: Any, value: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return rounded(value)

    @staticmethod
    def backward(_: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def straight_through(value: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return ``rounded(value)``, bit for bit, whose gradient is that of ``value``; both in the same shape and dtype."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return rounded(value)
    result: torch.Tensor = _Rounded.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


def as_bfloat16(value: torch.Tensor) -> torch.Tensor:
    """Return a value as BF16 holds it, in its own dtype; a gradient goes straight through."""
    return straight_through(value, lambda exact: exact.bfloat16().to(exact.dtype))
