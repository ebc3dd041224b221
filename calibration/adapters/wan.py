"""Wan on tokens in place of latents, with rotary embeddings from positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.utils.peft_utils import apply_lora_scale

from calibration.adapters.construction import constructed_as
from calibration.adapters.rotary import Rotation, angles, rotated
from fp4trt.families.wan import PATCH, rotary_axes

__all__ = ["Wan"]

_THETA = 10000.0
"""Base of the rotary frequencies."""


class _Processor:
    """Attention as diffusers' WanAttnProcessor, of a model that has no picture to attend to."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        rotary_emb: Rotation | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(read))
        query, key, value = (part.unflatten(2, (attn.heads, -1)) for part in (query, key, attn.to_v(read)))
        if rotary_emb is not None:
            query, key = rotated(query, rotary_emb), rotated(key, rotary_emb)
        found = dispatch_attention_fn(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False)
        given: torch.Tensor = attn.to_out[0](found.flatten(2, 3).to(query.dtype))
        return given


@constructed_as(WanTransformer3DModel)
class Wan(WanTransformer3DModel):
    """diffusers' transformer of Wan, called with tensors of tokens, or as its pipelines call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.rope  # tables that no checkpoint has, for which positions stand
        block: Any
        for block in self.blocks:
            block.attn1.set_processor(_Processor())
            block.attn2.set_processor(_Processor())

    @apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        img_ids: torch.Tensor | None = None,
        encoder_hidden_states_image: None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the velocity [B, L, 4 * out_channels], or for latents what diffusers returns.

        A token's channels are (channel, row, column) of its patch where they go in, as the weights of the patches'
        embedding lie, and (row, column, channel) where they come out.

        Args:
            hidden_states: [B, L, 4 * in_channels]; or latents [B, in_channels, frames, rows, columns].
            timestep: [B], 1000 (noise) to 0; of TI2V-5B [B, L].
            encoder_hidden_states: [B, T, text_dim].
            img_ids: FP32 [L, 3], frame, row and column; None where latents say them.
        """
        assert encoder_hidden_states_image is None
        latents = hidden_states if hidden_states.ndim == 5 else None
        if latents is not None:
            hidden_states, img_ids = _tokens_of(latents), _ids_of(latents)
        assert img_ids is not None
        velocity = self._velocity(hidden_states, timestep, encoder_hidden_states, img_ids)
        if latents is not None:
            velocity = _latents_of(velocity, latents.shape)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def inputs_of(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return the family's inputs, in its order, of a call as a pipeline makes it."""
        return {
            "hidden_states": _tokens_of(hidden_states),
            "timestep": timestep.float(),
            "encoder_hidden_states": encoder_hidden_states,
            "img_ids": _ids_of(hidden_states),
        }

    def answer_of(
        self, velocities: Sequence[torch.Tensor], hidden_states: torch.Tensor, *_args: Any, **_: Any
    ) -> torch.Tensor:
        """Return what diffusers' class returns for latents, of a graph's velocity [B, L, 4 * channels]."""
        return _latents_of(torch.cat(list(velocities)), hidden_states.shape)

    def _velocity(
        self, tokens: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """Return what the blocks, and what lies around them, make of tokens [B, L, channels]."""
        embedding = self.patch_embedding
        hidden_states = torch.nn.functional.linear(tokens, embedding.weight.flatten(1), embedding.bias)
        of_each = timestep.shape[1] if timestep.ndim == 2 else None
        temb, modulation, text, _ = self.condition_embedder(timestep.flatten(), text, None, timestep_seq_len=of_each)
        modulation, rotation = modulation.unflatten(-1, (6, -1)), self._rotation(ids)
        for block in self.blocks:
            hidden_states = block(hidden_states, text, modulation, rotation)
        shift, scale = (self.scale_shift_table + temb.unsqueeze(-2)).unbind(-2)
        if of_each is None:
            shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
        normed = self.norm_out(hidden_states.float()) * (1 + scale) + shift
        velocity: torch.Tensor = self.proj_out(normed.type_as(hidden_states))
        return velocity

    def _rotation(self, ids: torch.Tensor) -> Rotation:
        found = angles(ids.double(), rotary_axes(self.config["attention_head_dim"]), _THETA).float()
        return found.cos(), found.sin()


def _tokens_of(latents: torch.Tensor) -> torch.Tensor:
    """Return the patches of latents [B, C, F, H, W], [B, L, C * 4]."""
    patches = latents.unflatten(4, (-1, PATCH[2])).unflatten(3, (-1, PATCH[1]))
    return patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def _ids_of(latents: torch.Tensor) -> torch.Tensor:
    """Return frame, row and column of each patch of latents [B, C, F, H, W], FP32 [L, 3]."""
    counts = (size // side for size, side in zip(latents.shape[2:], PATCH, strict=True))
    axes = [torch.arange(count, device=latents.device, dtype=torch.float32) for count in counts]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _latents_of(velocity: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return tokens [B, L, 4 * C] as latents [B, C, F, H, W], whose shape is that of what went in but for C."""
    frames, rows, columns = (size // side for size, side in zip(shape[2:], PATCH, strict=True))
    patches = velocity.unflatten(2, (*PATCH[1:], -1)).unflatten(1, (frames, rows, columns))
    return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)
