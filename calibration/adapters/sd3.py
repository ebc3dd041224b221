"""Stable Diffusion 3 on tokens in place of pictures, whose positions are looked up by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch.nn import functional

from calibration.adapters.construction import constructed_as

__all__ = ["SD3"]


class _LastBlock(JointTransformerBlock):
    """The last block, which makes no text: it gives the one that it was given, where diffusers' gives None."""

    def forward(
        self, hidden_states: Any, encoder_hidden_states: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, image = super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        return encoder_hidden_states, image


@constructed_as(SD3Transformer2DModel)
class SD3(SD3Transformer2DModel):
    """diffusers' transformer of SD3 and SD3.5, called with the family's inputs, or as its pipelines call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._no_split_modules = [*(self._no_split_modules or ()), _LastBlock.__name__]
        last: Any = self.transformer_blocks[-1]
        last.__class__ = _LastBlock

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        img_ids: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the velocity [B, L, patch * patch * channels], or for latents what diffusers returns.

        Args:
            hidden_states: [B, L, channels * patch * patch], tokens of as many latents, channel by channel; or latents
                [B, channels, H, W]. A token of the result has the channels of its first latent first.
            encoder_hidden_states: [B, T, channels].
            pooled_projections: [B, channels].
            timestep: FP32 [B], 1000 (noise) to 0.
            img_ids: int64 [L, 2], row and column in the table of positions; None with latents.
            others: what diffusers' class takes besides.
        """
        if img_ids is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                pooled_projections,
                timestep,
                return_dict=return_dict,
                **others,
            )
        image = self._embedded(hidden_states, img_ids)
        times = self.time_text_embed(timestep, pooled_projections)
        text = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=times)
        velocity = self.proj_out(self.norm_out(image, times))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def inputs_of(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        """Return the family's inputs, in its order, of a call as a pipeline makes it."""
        patch, most = self.pos_embed.patch_size, self.pos_embed.pos_embed_max_size
        patches = hidden_states.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))
        rows, columns = patches.shape[2], patches.shape[4]
        axes = (torch.arange(count) + (most - count) // 2 for count in (rows, columns))
        return {
            "hidden_states": patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2),
            "encoder_hidden_states": encoder_hidden_states,
            "pooled_projections": pooled_projections,
            "timestep": timestep.float(),
            "img_ids": torch.cartesian_prod(*axes),
        }

    def answer_of(
        self, velocities: Sequence[torch.Tensor], hidden_states: torch.Tensor, *_args: Any, **_: Any
    ) -> torch.Tensor:
        """Return what diffusers' class returns for latents, of a graph's velocity [B, L, patch * patch * channels]."""
        patch, (rows, columns) = self.pos_embed.patch_size, hidden_states.shape[2:]
        patches = torch.cat(list(velocities)).unflatten(2, (patch, patch, -1))
        patches = patches.unflatten(1, (rows // patch, columns // patch))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def _embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what ``pos_embed`` makes of tokens: its convolution is a linear on them."""
        embed: Any = self.pos_embed
        found = functional.linear(tokens, embed.proj.weight.flatten(1), embed.proj.bias)
        numbers = positions[:, 0] * embed.pos_embed_max_size + positions[:, 1]
        embedded: torch.Tensor = (found + embed.pos_embed.index_select(1, numbers)).to(found.dtype)
        return embedded
