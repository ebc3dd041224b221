"""Krea 2 with the positions of image tokens alone: those of the text are 0."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_krea2 import Krea2Transformer2DModel

from calibration.adapters.masks import seen_text

__all__ = ["Krea2"]


class Krea2(Krea2Transformer2DModel):
    """diffusers' transformer of Krea 2, called with the family's inputs, or as its pipelines call it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the velocity [B, L, channels].

        Args:
            hidden_states: [B, L, channels].
            encoder_hidden_states: [B, T, layers, channels].
            timestep: [B], 1 (noise) to 0.
            img_ids: FP32 [L, 3]; None where ``position_ids`` [T + L, 3] has them behind the text's.
            encoder_attention_mask: bool [B, T], False where the text is padding; None where none is.
            others: what diffusers' class takes besides.
        """
        if position_ids is None:
            assert img_ids is not None
            position_ids = torch.cat([img_ids.new_zeros(encoder_hidden_states.shape[1], 3), img_ids])
        return super().forward(
            hidden_states,
            encoder_hidden_states,
            timestep,
            position_ids,
            encoder_attention_mask,
            return_dict=return_dict,
            **others,
        )

    def inputs_of(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        position_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the family's inputs, in its order, of a call as a pipeline makes it."""
        return {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "timestep": timestep,
            "img_ids": position_ids[encoder_hidden_states.shape[1] :].float(),
            "encoder_attention_mask": seen_text(encoder_attention_mask, encoder_hidden_states),
        }
