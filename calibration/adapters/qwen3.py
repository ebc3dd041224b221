"""Qwen3 as a text encoder, with a causal mask and rotary positions that a graph of any size can compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3

from calibration.adapters.rotary import angles

__all__ = ["Qwen3TextEncoder"]


def _turned(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Return queries or keys [B, heads, T, head] turned by FP32 [T, head / 2], in their own dtype."""
    one, other = x.float().chunk(2, dim=-1)
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1).to(x.dtype)


class _Layer(nn.Module):
    """What a layer becomes: the modules are transformers', and so are their tensors' names."""

    self_attn: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    mlp: Any

    keeps: int | None

    def forward(
        self,
        hidden_states: torch.Tensor,
        quarter: torch.Tensor,
        half: torch.Tensor,
        three_quarters: torch.Tensor,
        mask: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Run the layer on [B, T, width]; return what it gives, and the states that are read, each once it is known.

        Args:
            hidden_states: what the layer before it gave.
            quarter, half, three_quarters: the states behind so many of the layers, or any before they have run.
            mask: 0 where a token is seen and the least number where it is not, [B, 1, T, T].
            cosine, sine: of the tokens' angles, FP32 [T, head / 2].
        """
        attention = self.self_attn
        given = self.input_layernorm(hidden_states)
        query, key, value = (
            linear(given).unflatten(-1, (-1, attention.head_dim))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query = _turned(attention.q_norm(query).transpose(1, 2), cosine, sine)
        key = _turned(attention.k_norm(key).transpose(1, 2), cosine, sine)
        key, value = (
            shared[:, :, None].expand(-1, -1, attention.num_key_value_groups, -1, -1).flatten(1, 2)
            for shared in (key, value.transpose(1, 2))
        )
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=attention.scaling
        )
        after = hidden_states + attention.o_proj(attended.transpose(1, 2).flatten(2))
        result: torch.Tensor = after + self.mlp(self.post_attention_layernorm(after))
        kept = [quarter, half, three_quarters]
        if self.keeps is not None:
            kept[self.keeps] = result
        return result, *kept


class _Decoder(nn.Module):
    """The embedding, the layers and the norm behind them, which no output reads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        made: Any = modeling_qwen3.Qwen3Model(config)
        count = len(made.layers)
        read = (count // 4, count // 2, count // 4 * 3)
        for index, layer in enumerate(made.layers):
            layer.__class__ = _Layer
            layer.keeps = read.index(index + 1) if index + 1 in read else None
        self.embed_tokens, self.layers, self.norm = made.embed_tokens, made.layers, made.norm


class Qwen3TextEncoder(nn.Module):
    """Qwen3ForCausalLM of Z-Image and FLUX.2 klein, called as diffusers' models are.

    Pipelines read no state behind the last layer, so neither it nor the final norm and ``lm_head`` are computed.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = _Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._head, self._theta = config.head_dim, float(config.rope_parameters["rope_theta"])

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the encoder that a config.json of transformers describes, with no weights that matter."""
        return cls(Qwen3Config.from_dict(dict(config)))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``hidden_states[-2]`` [B, T, width], and those at a quarter, half and three quarters [B, T, 3 width].

        Args:
            input_ids: [B, T].
            attention_mask: 1 where a token is seen, 0 where it is padding that is not, [B, T].
            return_dict: for the call of diffusers' models; a tuple is returned all the same.
        """
        del return_dict
        hidden_states = self.model.embed_tokens(input_ids)
        tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
        turns = angles(tokens.float()[:, None], (self._head,), self._theta)
        cosine, sine = turns.cos(), turns.sin()
        hidden = (tokens[None, :] > tokens[:, None])[None, None] | (attention_mask == 0)[:, None, None, :]
        mask = hidden.to(hidden_states.dtype) * torch.finfo(hidden_states.dtype).min
        kept = (hidden_states,) * 3
        for layer in self.model.layers[:-1]:
            hidden_states, *kept = layer(hidden_states, *kept, mask, cosine, sine)
        return hidden_states, torch.cat(kept, dim=-1)
