"""What every number format computes, under one set of names: one module a format.

``quantize_reference`` (numpy, slow and obvious) is what each fast path is held against, bit for bit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch

from fp4trt.number_formats import FORMATS

__all__ = ["Arithmetic", "Pack", "arithmetic_of"]


Pack = Callable[[npt.NDArray[np.uint16]], Mapping[str, npt.NDArray[np.uint8]]]
"""Packs BF16 rows [N, K], given as bits, into stored bytes by leaf: ``weight`` and each block scale. Thread-safe."""


class Arithmetic(Protocol):
    """The module of a format."""

    @staticmethod
    def quantize_reference(x: npt.NDArray[np.float32], scale: float | np.float32) -> Any:
        """Return the bytes of codes and, in a format of blocks, of block scales of [..., K], slowly and obviously."""
        ...

    @staticmethod
    def tensor_scale(amax: torch.Tensor | float) -> torch.Tensor:
        """Return the FP32 scale of a tensor with this amax; 1 in a format without one."""
        ...

    @staticmethod
    def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Round [..., K] to the format and back, in the same dtype; a gradient goes straight through."""
        ...

    @staticmethod
    def stored(weight: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the codes (``weight``) and the weight's scales, by leaf, of a weight [N, K] rounded to nearest."""
        ...

    @staticmethod
    def restored(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the FP32 weight [N, K] that codes and scales, by leaf, stand for.

        Raises:
            ValueError: a scale is none of the format; the message names its leaf, and what was found and expected.
        """
        ...

    @staticmethod
    def packer(scale: torch.Tensor, device: str) -> Pack:
        """Return what packs BF16 weights under a scale; ``device`` is ``cpu`` or ``cuda``."""
        ...


def arithmetic_of(name: str) -> Arithmetic:
    """Return what computes the format of this name."""
    return cast(Arithmetic, importlib.import_module(FORMATS[name].arithmetic))
