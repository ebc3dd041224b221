"""CLIP's text encoders with a causal mask and an end of text that a graph of any size can compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

__all__ = ["CLIPProjectedTextEncoder", "CLIPTextEncoder"]

_END: int = 2
"""The ``eos_token_id`` of configs in which it says nothing: the end of a text is then its largest id."""


class _QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), in FP32: a graph in BF16 would round the constant."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the same shape and dtype."""
        wide = x.float()
        return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


class _Layer(nn.Module):
    """What a layer becomes: the modules are transformers', and so are their tensors' names."""

    self_attn: Any
    layer_norm1: Any
    layer_norm2: Any
    mlp: Any

    def forward(
        self, hidden_states: torch.Tensor, before: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer on [B, T, width]; return what it gives, and what it was given.

        Args:
            hidden_states: what the layer before it gave.
            before: what that layer was given.
            mask: 0 where a token is seen and the least number where it is not, [T, T].
        """
        del before
        attention = self.self_attn
        given = self.layer_norm1(hidden_states)
        query, key, value = (
            linear(given).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scale)
        after = hidden_states + attention.out_proj(attended.transpose(1, 2).flatten(2))
        return after + self.mlp(self.layer_norm2(after)), hidden_states


class _TextEncoder(nn.Module):
    """An encoder, called as diffusers' models are."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.text_model = CLIPTextModel(config)
        self._end = config.eos_token_id
        layers: Any = self.text_model.encoder.layers
        for layer in layers:
            layer.__class__ = _Layer
            if config.hidden_act == "quick_gelu":
                layer.mlp.activation_fn = _QuickGELU()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the encoder that a config.json of transformers describes, with no weights that matter."""
        return cls(CLIPTextConfig.from_dict(dict(config)))

    def _encoded(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the last layer was given [B, T, width], and the normed state at the end of text [B, width]."""
        parts = self.text_model
        tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = parts.embeddings.position_embedding(tokens)
        hidden_states = parts.embeddings.token_embedding(input_ids) + positions
        least = torch.finfo(hidden_states.dtype).min
        mask = (tokens[None, :] > tokens[:, None]).to(hidden_states.dtype) * least
        before = hidden_states
        for layer in parts.encoder.layers:
            hidden_states, before = layer(hidden_states, before, mask)
        last = parts.final_layer_norm(hidden_states)
        end = self._first_end(input_ids, tokens)[:, None, None].expand(-1, 1, last.shape[-1])
        return before, torch.gather(last, 1, end).squeeze(1)

    def _first_end(self, input_ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the place of the first end of text [B]: no two tokens have one score, so that every runtime agrees."""
        ends = input_ids if self._end == _END else (input_ids == self._end).long()
        return (ends * self.text_model.config.max_position_embeddings - tokens).float().argmax(-1)


class CLIPTextEncoder(_TextEncoder):
    """CLIPTextModel of FLUX.1."""

    def forward(self, input_ids: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        """Return the pooled output [B, width].

        Args:
            input_ids: [B, T], 77 of them as pipelines give them.
            return_dict: for the call of diffusers' models; a tuple is returned all the same.
        """
        del return_dict
        return (self._encoded(input_ids)[1],)


class CLIPProjectedTextEncoder(_TextEncoder):
    """CLIPTextModelWithProjection of SD3."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the projected pooled output [B, projection_dim] and ``hidden_states[-2]`` [B, T, width].

        Args:
            input_ids: [B, T], 77 of them as pipelines give them.
            return_dict: for the call of diffusers' models; a tuple is returned all the same.
        """
        del return_dict
        before, pooled = self._encoded(input_ids)
        return self.text_projection(pooled), before
