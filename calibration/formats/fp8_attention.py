"""Attention whose two products are in FP8, as torch runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from calibration.formats import fp8
from calibration.formats.attention_amax import ATTENTION, checked_attentions
from fp4trt.account import ATTENTION_SCALES, OUTPUT_SCALE

__all__ = [
    "MODULE",
    "PROBABILITY_SCALE",
    "SCALES",
    "FP8Attention",
    "attention_quantizers",
    "attention_scales",
    "quantize_attention",
]

MODULE: Final = "fp8_attention"
"""What such an attention calls the module that computes its products."""

SCALES: Final = ATTENTION_SCALES
"""What an attention in FP8 has beside its linears: FP32 scalars, amax / 448 of query, key and value."""

PROBABILITY_SCALE: Final = 1 / fp8.E4M3_MAX
"""Scale of the softmax's output, which lies in [0, 1]."""


def attention_scales(amax: Mapping[str, float], attentions: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the scales of attentions as a checkpoint has them, FP32, 0-d, from their operands' maxima.

    Raises:
        BadAmax: one is missing, or gives no scale, naming the operand.
    """
    return {f"{name}_scale": fp8.tensor_scale(value) for name, value in checked_attentions(amax, attentions).items()}


def attention_quantizers(amax: Mapping[str, float], attentions: Sequence[str]) -> dict[str, float]:
    """Return the same amax by the names of ModelOpt's quantizers.

    Raises:
        BadAmax: as :func:`attention_scales`.
    """
    return {f"{name}_bmm_quantizer": value for name, value in checked_attentions(amax, attentions).items()}


class FP8Attention(nn.Module):
    """``softmax(q @ k.T / sqrt(D)) @ v``, every operand of a product rounded to E4M3 under one scale.

    The order of the exported graph: products in the operands' own dtype; between them, scaling and softmax in FP32.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scales: Iterable[torch.Tensor],
        output_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return [B, H, L, D] in the operands' dtype.

        Args:
            query: [B, H, L, D], with its positions.
            key: [B, H, S, D], likewise.
            value: [B, H, S, D].
            scales: of the three, FP32, 0-d.
            output_scale: what the result is rounded to E4M3 under, FP32, 0-d; None leaves it in 16 bit.
        """
        q, k, v = (fp8.fake_quantize(x, scale) for x, scale in zip((query, key, value), scales, strict=True))
        scores = (q @ k.transpose(-1, -2)).float() * torch.tensor(query.shape[-1] ** -0.5, device=q.device)
        rounded = fp8.fake_quantize(scores.softmax(-1), torch.tensor(PROBABILITY_SCALE, device=q.device))
        output = rounded.to(v.dtype) @ v
        return output if output_scale is None else fp8.fake_quantize(output, output_scale)


def quantize_attention(attention: nn.Module, rounds_output: bool = False) -> None:
    """Let a diffusers attention module compute in FP8; its state gets the buffers :data:`SCALES`, without values.

    Args:
        attention: changed in place.
        rounds_output: round what the second product gives too; the state gets ``output_scale`` besides.
    """
    for name in (*SCALES, OUTPUT_SCALE) if rounds_output else SCALES:
        attention.register_buffer(name, torch.empty((), dtype=torch.float32))
    attention.add_module(MODULE, FP8Attention())
    attention.processor = _FP8Processor(attention.processor)  # type: ignore[assignment, arg-type]


class _FP8Processor:
    """A diffusers attention processor as it is, but for the one call of torch's attention in it."""

    def __init__(self, processor: Callable[..., Any]) -> None:
        self.processor = processor

    def __call__(self, attn: nn.Module, *given: Any, **named: Any) -> Any:
        with _InPlaceOfAttention(attn):
            return self.processor(attn, *given, **named)


class _InPlaceOfAttention(TorchFunctionMode):
    """Gives ``scaled_dot_product_attention`` to a module's :class:`FP8Attention`."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not ATTENTION:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        operands = [given.pop(name) for name in ("query", "key", "value")]
        assert not any(given.values()), f"an attention in FP8 has no {', '.join(given)}"
        scales = [getattr(self.attention, name) for name in SCALES]
        return self.attention.get_submodule(MODULE)(*operands, scales, getattr(self.attention, OUTPUT_SCALE, None))
