"""Chroma with a mask of the text alone, and without a table that no checkpoint has."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

from calibration.adapters.construction import constructed_as
from calibration.adapters.masks import seen_text

__all__ = ["Chroma"]


class _Processor(FluxAttnProcessor):
    """diffusers' attention, in which a mask may say of keys alone whether they are seen.

    That of diffusers hides queries too, where a row without a key to see is NaN in some runtimes. Nothing that is seen
    reads what such a query gives.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        seen: torch.Tensor | None = None,
    ) -> Any:
        mask = attention_mask if seen is None else seen[:, None, None, :]
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)


class _Embedding(nn.Module):
    """What the network of modulations reads: time, guidance, and the number of each modulation, [B, count, channels].

    diffusers holds the numbers' part in a buffer that no checkpoint has, and that is empty in a model that is made on
    the meta device. Here it is a constant, not computed in the graph: sines of up to 1000 times the count of
    modulations hang on the last bit of what they are of.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.channels = channels
        self.guidance = _waves(torch.arange(1, device="cpu"), channels)
        self.numbers = _waves(torch.arange(count, device="cpu") * 1000, 2 * channels)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        batch, count = timestep.shape[0], self.numbers.shape[0]
        guidance, numbers = (each.to(timestep.device, timestep.dtype) for each in (self.guidance, self.numbers))
        times = _waves(timestep, self.channels).to(timestep.dtype)
        times = torch.cat([times, guidance.expand(batch, -1)], dim=1)
        return torch.cat([times[:, None].expand(-1, count, -1), numbers[None].expand(batch, -1, -1)], dim=-1)


def _waves(steps: torch.Tensor, channels: int) -> torch.Tensor:
    """Return sines and cosines of times [N], FP32 [N, channels]."""
    waves: torch.Tensor = get_timestep_embedding(steps, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    return waves


@constructed_as(ChromaTransformer2DModel)
class Chroma(ChromaTransformer2DModel):
    """diffusers' transformer of Chroma, called with the family's inputs, or as its pipelines call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        embedding: Any = self.time_text_embed
        self.time_text_embed: Any = _Embedding(self.config["approximator_num_channels"] // 4, len(embedding.mod_proj))
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            block.attn.set_processor(_Processor())  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the velocity [B, L, channels].

        Args:
            hidden_states: [B, L, channels].
            encoder_hidden_states: [B, T, channels].
            timestep: [B], 1 (noise) to 0.
            img_ids, txt_ids: FP32 [L, 3] and [T, 3].
            encoder_attention_mask: bool [B, T], False where the text is hidden; None where ``attention_mask`` of
                diffusers' class, or nothing, says so.
            others: what diffusers' class takes besides.
        """
        if encoder_attention_mask is not None:
            image = encoder_attention_mask.new_ones(hidden_states.shape[:2])
            others["joint_attention_kwargs"] = {"seen": torch.cat([encoder_attention_mask, image], dim=1)}
        return super().forward(
            hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids, return_dict=return_dict, **others
        )

    def inputs_of(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the family's inputs, in its order, of a call as a pipeline makes it.

        In a mask of numbers, as the pipelines of diffusers 0.42 give it, 0 hides, as its authors mean it. diffusers
        adds such a mask to the logits of attention, so that what is to be hidden counts for less, by a factor of e.
        """
        return {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "timestep": timestep,
            "img_ids": img_ids.float(),
            "txt_ids": txt_ids.float(),
            "encoder_attention_mask": seen_text(attention_mask, encoder_hidden_states),
        }
