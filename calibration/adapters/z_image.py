"""Z-Image on tokens in place of lists of pictures and captions, with rotary embeddings in real numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel

from calibration.adapters.construction import constructed_as
from calibration.adapters.rotary import Rotation, angles, rotated
from fp4trt.errors import BadInputs
from fp4trt.families.z_image import PATCH

__all__ = ["ZImage"]

_MULTIPLE = 32
"""Tokens of a picture, and of a caption, are padded to a multiple of so many."""


class _Processor:
    """Attention as diffusers' ZSingleStreamAttnProcessor."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: Rotation | torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert encoder_hidden_states is None
        assert freqs_cis is not None
        rotation = (freqs_cis.real, freqs_cis.imag) if isinstance(freqs_cis, torch.Tensor) else freqs_cis
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        mask = attention_mask[:, None, None, :] if attention_mask is not None else None
        found = dispatch_attention_fn(
            rotated(query, rotation), rotated(key, rotation), value, attn_mask=mask, dropout_p=0.0, is_causal=False
        )
        given: torch.Tensor = attn.to_out[0](found.flatten(2, 3).to(query.dtype))
        return given


@constructed_as(ZImageTransformer2DModel)
class ZImage(ZImageTransformer2DModel):
    """diffusers' transformer of Z-Image, called with tensors alone, or as its pipelines call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
            block.attention.set_processor(_Processor())

    def forward(
        self,
        hidden_states: torch.Tensor | Sequence[torch.Tensor],
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | Sequence[torch.Tensor],
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        img_pad: torch.Tensor | None = None,
        txt_pad: torch.Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the velocity [B, L, 4 * channels], or for lists what diffusers returns.

        Args:
            hidden_states: [B, L, 4 * channels], tokens of 2 x 2 latents; or a list of latents.
            timestep: FP32 [B], 0 (noise) to 1.
            encoder_hidden_states: [B, T, channels]; or a list of captions.
            img_ids, txt_ids: FP32 [L, 3] and [T, 3].
            img_pad, txt_pad: bool [L] and [T], True where a token is padding.
            others: what diffusers' class takes besides.
        """
        if not isinstance(hidden_states, torch.Tensor):
            return super().forward(hidden_states, timestep, encoder_hidden_states, return_dict=return_dict, **others)
        assert isinstance(encoder_hidden_states, torch.Tensor)
        assert img_ids is not None
        assert txt_ids is not None
        assert img_pad is not None
        assert txt_pad is not None
        times = self._embedded(timestep * self.t_scale).to(hidden_states.dtype)
        image = torch.where(img_pad[None, :, None], self.x_pad_token, self.all_x_embedder[PATCH](hidden_states))
        text = torch.where(txt_pad[None, :, None], self.cap_pad_token, self.cap_embedder(encoder_hidden_states))
        of_image, of_text = self._rotation(img_ids), self._rotation(txt_ids)
        for block in self.noise_refiner:
            image = block(image, None, of_image, times)
        for block in self.context_refiner:
            text = block(text, None, of_text)
        both = torch.cat([image, text], dim=1)
        of_both = torch.cat([of_image[0], of_text[0]]), torch.cat([of_image[1], of_text[1]])
        for block in self.layers:
            both = block(both, None, of_both, times)
        velocity = self.all_final_layer[PATCH](both, c=times)[:, : hidden_states.shape[1]]
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def calls_of(
        self, x: Sequence[torch.Tensor], t: torch.Tensor, cap_feats: Sequence[torch.Tensor], **_: Any
    ) -> list[dict[str, torch.Tensor]]:
        """Return the family's inputs of a call as a pipeline makes it.

        Of a batch whose captions or pictures are of unlike sizes, as a guided step's are, that is a call for each
        picture: a graph has no mask for what diffusers fills up the shorter captions with.
        """
        if len({(one.shape, caption.shape) for one, caption in zip(x, cap_feats, strict=True)}) == 1:
            return [self.inputs_of(x, t, cap_feats)]
        return [self.inputs_of([one], t[i : i + 1], [cap_feats[i]]) for i, one in enumerate(x)]

    def inputs_of(
        self, x: Sequence[torch.Tensor], t: torch.Tensor, cap_feats: Sequence[torch.Tensor], **_: Any
    ) -> dict[str, torch.Tensor]:
        """Return the family's inputs, in its order, of a call as a pipeline makes it.

        Raises:
            BadInputs: the pictures, or the padded captions, of the batch are of unlike sizes.
        """
        ends = [-len(caption) % _MULTIPLE for caption in cap_feats]
        captions = [torch.cat([one, one[-1:].expand(end, -1)]) for one, end in zip(cap_feats, ends, strict=True)]
        if (
            len({(one.shape, end) for one, end in zip(captions, ends, strict=True)}) > 1
            or len({i.shape for i in x}) > 1
        ):
            raise BadInputs("pictures or captions of one batch are of unlike lengths; capture one picture a call")
        latents = torch.stack(list(x))
        batch, channels, frames, height, width = latents.shape
        rows, columns = height // 2, width // 2
        patches = latents.view(batch, channels, frames, rows, 2, columns, 2).permute(0, 2, 3, 5, 4, 6, 1)
        tokens = patches.reshape(batch, frames * rows * columns, 4 * channels)
        count, end, text = tokens.shape[1], -tokens.shape[1] % _MULTIPLE, len(captions[0])
        axes = torch.arange(text + 1, text + 1 + frames), torch.arange(rows), torch.arange(columns)
        ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
        of_text = torch.zeros(text, 3)
        of_text[:, 0] = torch.arange(1, text + 1)
        return {
            "hidden_states": torch.cat([tokens, tokens[:, -1:].expand(-1, end, -1)], dim=1),
            "timestep": t.float(),
            "encoder_hidden_states": torch.stack(captions),
            "img_ids": torch.cat([ids, ids.new_zeros(end, 3)]).float(),
            "txt_ids": of_text,
            "img_pad": torch.arange(count + end) >= count,
            "txt_pad": torch.arange(text) >= text - ends[0],
        }

    def answer_of(
        self, velocities: Sequence[torch.Tensor], x: Sequence[torch.Tensor], *_args: Any, **_: Any
    ) -> list[torch.Tensor]:
        """Return what diffusers' class returns for a list of latents, of a graph's velocity in each of its calls."""
        tokens = (one for velocity in velocities for one in velocity)
        return [_latents_of(one, latents.shape) for one, latents in zip(tokens, x, strict=True)]

    def _embedded(self, times: torch.Tensor) -> torch.Tensor:
        """Return what ``t_embedder`` makes of times, without a switch for autocasts, which no graph has."""
        half = self.t_embedder.frequency_embedding_size // 2
        steps = torch.arange(start=0, end=half, dtype=torch.float32, device=times.device)
        turns = times[:, None].float() * torch.exp(-math.log(10000) * steps / half)[None]
        waves = torch.cat([torch.cos(turns), torch.sin(turns)], dim=-1)
        embedded: torch.Tensor = self.t_embedder.mlp(waves.to(next(self.t_embedder.parameters()).dtype))
        return embedded

    def _rotation(self, positions: torch.Tensor) -> Rotation:
        found = angles(positions.double(), self.config["axes_dims"], self.rope_theta).float()
        return found.cos(), found.sin()


def _latents_of(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return tokens [L, 4 * channels], padding behind them, as latents [channels, frames, rows, columns]."""
    _, frames, height, width = shape
    rows, columns = height // 2, width // 2
    patches = tokens[: frames * rows * columns].view(frames, rows, columns, 2, 2, -1)
    return patches.permute(5, 0, 1, 3, 2, 4).reshape(-1, frames, height, width)
