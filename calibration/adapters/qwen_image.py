"""Qwen-Image with positions as a tensor, and rotary embeddings in real numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel, QwenImageTransformerBlock
from diffusers.utils.peft_utils import apply_lora_scale

from calibration.adapters.construction import constructed_as
from calibration.adapters.masks import seen_text
from calibration.adapters.rotary import Rotation, angles, rotated
from fp4trt.errors import BadInputs

__all__ = ["QwenImage"]

Inputs = dict[str, torch.Tensor]
Shapes = Sequence[Any]
"""Frames, rows and columns of the picture, or of the pictures, of each sequence in a batch."""


class _Processor:
    """Attention of text and image together, as diffusers' QwenDoubleStreamAttnProcessor2_0."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: None = None,
        image_rotary_emb: tuple[Rotation, Rotation] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert attention_mask is None
        assert image_rotary_emb is not None
        image = [linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        text = [linear(encoder_hidden_states) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        head = attn.inner_dim // attn.heads
        image, text = ([part.unflatten(-1, (-1, head)) for part in parts] for parts in (image, text))
        for parts, norms, rotation in (
            (image, (attn.norm_q, attn.norm_k), image_rotary_emb[0]),
            (text, (attn.norm_added_q, attn.norm_added_k), image_rotary_emb[1]),
        ):
            parts[:2] = [rotated(norm(part), rotation) for norm, part in zip(norms, parts[:2], strict=True)]
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        mask = None
        if encoder_hidden_states_mask is not None:
            seen = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat([encoder_hidden_states_mask, seen], dim=1)[:, None, None, :]
        found = dispatch_attention_fn(query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False)
        found = found.flatten(2, 3).to(query.dtype)
        tokens = encoder_hidden_states.shape[1]
        return attn.to_out[0](found[:, tokens:].contiguous()), attn.to_add_out(found[:, :tokens].contiguous())


class _TwoTimesBlock(QwenImageTransformerBlock):
    """A block of Edit-2511, whose modulations come twice: at the step's time, and for references at time 0.

    diffusers halves the batch of the text's by ``chunk``, which would fix it in a graph.
    """

    def _modulate(self, x: torch.Tensor, mod_params: torch.Tensor, index: torch.Tensor | None = None) -> Any:
        return super()._modulate(  # type: ignore[no-untyped-call]
            x, mod_params if index is not None else mod_params[: x.shape[0]], index
        )


@constructed_as(QwenImageTransformer2DModel)
class QwenImage(QwenImageTransformer2DModel):
    """diffusers' transformer of Qwen-Image, called with tensors alone, or as its pipelines call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._no_split_modules = [*(self._no_split_modules or ()), _TwoTimesBlock.__name__]
        block: Any
        for block in self.transformer_blocks:
            block.attn.set_processor(_Processor())
            if self.zero_cond_t:
                block.__class__, block.zero_cond_t = _TwoTimesBlock, False

    @apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        img_ids: torch.Tensor | None = None,
        txt_ids: torch.Tensor | None = None,
        modulate_index: torch.Tensor | None = None,
        additional_t_cond: torch.Tensor | None = None,
        img_shapes: Shapes | None = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the velocity [B, L, channels].

        Args:
            hidden_states: [B, L, channels], the picture's tokens, references behind them.
            encoder_hidden_states: [B, T, channels].
            encoder_hidden_states_mask: bool [B, T], False where the text is padding; None where none is.
            timestep: [B], 1 (noise) to 0.
            img_ids, txt_ids: FP32 [L, 3] and [T]; None where ``img_shapes`` says them.
            modulate_index: [B, L], 1 where a token is a reference's, of a model that tells them apart.
            additional_t_cond: int64 [B].
            img_shapes: frames, rows and columns of each picture, as the pipelines give them.

        Raises:
            BadInputs: ``guidance`` is given, as a pipeline does where the config asks for it.
        """
        if guidance is not None:
            raise BadInputs(
                "a call has guidance, which diffusers' class of Qwen-Image has no embedding of; set guidance_embeds in "
                "config.json to false"
            )
        assert timestep is not None
        if img_shapes is not None:
            img_ids, txt_ids = self._ids(img_shapes, encoder_hidden_states)
            modulate_index = self._references(img_shapes, hidden_states)
        assert img_ids is not None
        assert txt_ids is not None
        hidden_states = self.img_in(hidden_states)
        times = timestep.to(hidden_states.dtype)
        temb = torch.cat([times, times * 0]) if self.zero_cond_t else times
        temb = self.time_text_embed(temb, hidden_states, additional_t_cond)
        text = self.txt_in(self.txt_norm(encoder_hidden_states))
        rotation = self._rotation(img_ids), self._rotation(txt_ids[:, None].expand(-1, 3))
        for block in self.transformer_blocks:
            text, hidden_states = block(
                hidden_states=hidden_states,
                encoder_hidden_states=text,
                encoder_hidden_states_mask=encoder_hidden_states_mask,
                temb=temb,
                image_rotary_emb=rotation,
                modulate_index=modulate_index,
            )
        velocity = self.proj_out(self.norm_out(hidden_states, temb[: hidden_states.shape[0]]))
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def inputs_of(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        img_shapes: Shapes,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        additional_t_cond: torch.Tensor | None = None,
        **_: Any,
    ) -> Inputs:
        """Return the family's inputs, in its order, of a call as a pipeline makes it."""
        img_ids, txt_ids = self._ids(img_shapes, encoder_hidden_states)
        found = {
            "hidden_states": hidden_states,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_mask": seen_text(encoder_hidden_states_mask, encoder_hidden_states),
            "timestep": timestep,
            "img_ids": img_ids,
            "txt_ids": txt_ids,
            "modulate_index": self._references(img_shapes, hidden_states),
            "additional_t_cond": additional_t_cond,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _rotation(self, positions: torch.Tensor) -> Rotation:
        found = angles(positions, self.config["axes_dims_rope"], self.pos_embed.theta)
        return found.cos(), found.sin()

    def _ids(self, shapes: Shapes, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the positions of the tokens of pictures, and of the text."""
        pictures, found, first = _of_first(shapes), [], 0
        for index, (frames, rows, columns) in enumerate(pictures):
            condition = self.config["use_layer3d_rope"] and index == len(pictures) - 1
            begin = -1 if condition else index
            axes = (
                torch.arange(begin, begin + frames),
                torch.arange(rows) - (rows - rows // 2),
                torch.arange(columns) - (columns - columns // 2),
            )
            found.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3))
            first = max(first, rows // 2, columns // 2)
        if self.config["use_layer3d_rope"]:
            first = max(first, len(pictures) - 1)
        ids = torch.cat(found).to(text.device, torch.float32)
        return ids, torch.arange(first, first + text.shape[1], device=text.device, dtype=torch.float32)

    def _references(self, shapes: Shapes, latents: torch.Tensor) -> torch.Tensor | None:
        """Return which tokens are of references, int32 [B, L]; None where the model does not ask."""
        if not self.zero_cond_t:
            return None
        sizes = [math.prod(shape) for shape in _of_first(shapes)]
        row = torch.tensor([0] * sizes[0] + [1] * sum(sizes[1:]), dtype=torch.int32, device=latents.device)
        return row.expand(latents.shape[0], -1)


def _of_first(shapes: Shapes) -> Sequence[tuple[int, int, int]]:
    """Return the shapes of the pictures in the first sequence of a batch, which all share."""
    first = shapes[0]
    return [first] if isinstance(first, tuple) else first
