"""T5's and UMT5's encoders with a mask of their own making, so that sizes stay symbolic while they are traced.

transformers makes masks with functions that torch.export cannot follow for sizes that change; everything else is its
modules, under their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from transformers import T5Config, UMT5Config
from transformers.models.t5 import modeling_t5
from transformers.models.umt5 import modeling_umt5

__all__ = ["T5TextEncoder", "UMT5TextEncoder"]


def _edges(buckets: int, farthest: int) -> list[int]:
    """Return the distances at which buckets begin, but for the first, by transformers' own function on the CPU."""
    with torch.device("cpu"):
        found = modeling_t5.T5Attention._relative_position_bucket(  # type: ignore[no-untyped-call]
            -torch.arange(farthest + 1), num_buckets=buckets, max_distance=farthest
        ).tolist()
    return [index for index in range(1, len(found)) for _ in range(found[index] - found[index - 1])]


def _bias(attention: Any, tokens: int, device: torch.device) -> torch.Tensor:
    """Return what an attention adds to its scores, [1, heads, T, T].

    transformers finds the bucket of a distance by a logarithm, which runtimes may round apart at the edges; here it is
    found by comparison of whole numbers.
    """
    places = torch.arange(tokens, device=device)
    ahead = places[None, :] - places[:, None]
    bucket = (ahead > 0).to(torch.int64) * (attention.relative_attention_num_buckets // 2)
    for edge in attention.edges:
        bucket = bucket + (ahead.abs() >= edge).to(torch.int64)
    values: torch.Tensor = attention.relative_attention_bias(bucket)
    return values.permute(2, 0, 1)[None]


class _Block(nn.Module):
    """What a block of either encoder becomes: ``layer`` is transformers', and so are its tensors' names."""

    layer: Any

    def forward(
        self, hidden_states: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block.

        Args:
            hidden_states: [B, T, width].
            bias: that the block before it added to the scores, [B, heads, T, T]; T5 computes it in the first alone.
            mask: 0 where a token is seen and the least number where it is not, [B, 1, 1, T].

        Returns:
            Hidden states and bias of this block.
        """
        attention, norm = self.layer[0].SelfAttention, self.layer[0].layer_norm
        given = norm(hidden_states)
        tokens = given.shape[1]
        if attention.has_relative_attention_bias:
            bias = _bias(attention, tokens, given.device).to(given.dtype) + mask
        query, key, value = (
            linear(given).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
            for linear in (attention.q, attention.k, attention.v)
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        hidden_states = hidden_states + attention.o(attended.transpose(1, 2).flatten(2))
        return self.layer[-1](hidden_states), bias


class _Encoder(nn.Module):
    """The blocks and the norm behind them."""

    def __init__(self, stack: type[Any], config: Any) -> None:
        super().__init__()
        made = stack(config)
        edges = _edges(config.relative_attention_num_buckets, config.relative_attention_max_distance)
        for block in made.block:
            block.__class__ = _Block
            block.layer[0].SelfAttention.edges = edges
            # transformers' gelu_new is the same, in six operators whose constants a graph would round to BF16
            block.layer[-1].DenseReluDense.act = nn.GELU(approximate="tanh")
        self.block, self.final_layer_norm = made.block, made.final_layer_norm


class _TextEncoder(nn.Module):
    """An encoder, called as diffusers' models are."""

    _config_class: type[Any]
    _stack: type[Any]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = _Encoder(self._stack, config)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make the encoder that a config.json of transformers describes, with no weights that matter."""
        described = cls._config_class.from_dict({**config, "is_decoder": False, "use_cache": False})
        return cls(described)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, return_dict: bool = False
    ) -> tuple[torch.Tensor]:
        """Return the last hidden state, [B, T, d_model].

        Args:
            input_ids: [B, T].
            attention_mask: 1 where a token is seen, 0 where it is padding that is not, [B, T].
            return_dict: for the call of diffusers' models; a tuple is returned all the same.
        """
        del return_dict
        hidden_states = self.shared(input_ids)
        least = torch.finfo(hidden_states.dtype).min
        mask = (1 - attention_mask[:, None, None, :]).to(hidden_states.dtype) * least
        bias = mask
        for block in self.encoder.block:
            hidden_states, bias = block(hidden_states, bias, mask)
        return (self.encoder.final_layer_norm(hidden_states),)


class T5TextEncoder(_TextEncoder):
    """T5EncoderModel of FLUX.1, SD3 and Chroma, whose first block computes the bias of all."""

    _config_class, _stack = T5Config, modeling_t5.T5Stack


class UMT5TextEncoder(_TextEncoder):
    """UMT5EncoderModel of Wan, in which every block computes a bias of its own."""

    _config_class, _stack = UMT5Config, modeling_umt5.UMT5Stack
