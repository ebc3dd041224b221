"""LTX-2 and LTX-2.3, with attention masks and rotary embeddings that a graph can have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx2 import LTX2PerturbedAttnProcessor, LTX2VideoTransformer3DModel

from calibration.adapters.construction import constructed_as
from calibration.adapters.masks import seen_text
from calibration.adapters.rotary import Rotation
from fp4trt.errors import BadInputs

__all__ = ["LTX2"]


class _Processor(LTX2PerturbedAttnProcessor):
    """Attention as diffusers' LTX2AudioVideoAttnProcessor, and as its base class where some of a batch skip it."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        query_rotary_emb: Rotation | None = None,
        key_rotary_emb: Rotation | None = None,
        perturbation_mask: torch.Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> torch.Tensor:
        if perturbation_mask is not None:
            return super().__call__(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                perturbation_mask,
                all_perturbed,
            )
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(read)), attn.to_v(read)
        if query_rotary_emb is not None:
            rotate = _rotated_halves if attn.rope_type == "split" else _rotated_neighbours
            query = rotate(query, query_rotary_emb)
            key = rotate(key, query_rotary_emb if key_rotary_emb is None else key_rotary_emb)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)) for part in (query, key, value))
        mask = attention_mask
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None].expand(-1, attn.heads, -1, -1)
        found = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=0.0,
            is_causal=False,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).to(query.dtype)
        if attn.to_gate_logits is not None:
            found = found * (2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))).unsqueeze(-1)
        given: torch.Tensor = attn.to_out[0](found.flatten(2, 3))
        return given


def _rotated_halves(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return [B, tokens, channels] with the halves of heads turned; rotations are [B, heads, tokens, head / 2]."""
    cosine, sine = (part.transpose(1, 2) for part in rotation)
    one, other = x.unflatten(-1, (cosine.shape[2], -1)).float().chunk(2, dim=-1)
    turned = torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1)
    return turned.flatten(2).to(x.dtype)


def _rotated_neighbours(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Return [B, tokens, channels] with pairs of neighbours turned; rotations are [B, tokens, channels]."""
    cosine, sine = rotation
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], dim=-1).flatten(2)
    return (x.float() * cosine + across.float() * sine).to(x.dtype)


@constructed_as(LTX2VideoTransformer3DModel)
class LTX2(LTX2VideoTransformer3DModel):
    """diffusers' transformer of LTX-2 and LTX-2.3, called with tensors alone, or as its pipelines call it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        block: Any
        for block in self.transformer_blocks:
            for module in block.children():
                if hasattr(module, "set_processor"):
                    module.set_processor(_Processor())  # type: ignore[no-untyped-call]

    def forward(
        self,
        hidden_states: torch.Tensor,
        audio_hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        audio_encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        audio_timestep: torch.Tensor | None = None,
        sigma: torch.Tensor | None = None,
        audio_sigma: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        audio_encoder_attention_mask: torch.Tensor | None = None,
        video_coords: torch.Tensor | None = None,
        audio_coords: torch.Tensor | None = None,
        use_cross_timestep: bool | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the velocities of the video [B, L, channels] and of the sound [B, A, channels].

        Args:
            hidden_states, audio_hidden_states: [B, L, channels] and [B, A, channels].
            encoder_hidden_states, audio_encoder_hidden_states: [B, T, channels].
            timestep, audio_timestep: FP32 [B], 1000 (noise) to 0.
            sigma, audio_sigma: likewise; read by LTX-2.3.
            encoder_attention_mask, audio_encoder_attention_mask: bool [B, T], False where the text is padding.
            video_coords, audio_coords: FP32 [B, 3, L, 2] and [B, 1, A, 2], where each token begins and ends.
            use_cross_timestep: whether what video and sound tell each other is modulated by the sender's time, and not
                by the receiver's; by default as the family has it, in LTX-2.3.
            others: what diffusers' class takes besides.
        """
        return super().forward(
            hidden_states=hidden_states,
            audio_hidden_states=audio_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            audio_encoder_hidden_states=audio_encoder_hidden_states,
            timestep=timestep,
            audio_timestep=audio_timestep,
            sigma=sigma,
            audio_sigma=audio_sigma,
            encoder_attention_mask=encoder_attention_mask,
            audio_encoder_attention_mask=audio_encoder_attention_mask,
            video_coords=video_coords,
            audio_coords=audio_coords,
            use_cross_timestep=self.prompt_modulation if use_cross_timestep is None else use_cross_timestep,
            return_dict=return_dict,
            **others,
        )

    def inputs_of(self, timestep: torch.Tensor, **call: Any) -> dict[str, torch.Tensor]:
        """Return the family's inputs, in its order, of a call as a pipeline makes it.

        Raises:
            BadInputs: the call asks for what the graph does not compute.
        """
        text, sound = call["encoder_hidden_states"], call["audio_encoder_hidden_states"]
        of_video = _of_batch("timestep", timestep)
        of_audio = _of_batch("audio_timestep", _given(call.get("audio_timestep"), timestep))
        sigma = _given(call.get("sigma"), of_video)
        audio_sigma = _given(call.get("audio_sigma"), sigma)
        self._refuse_what_no_graph_has(call, torch.equal(audio_sigma, of_video) and torch.equal(sigma, of_audio))
        found = {
            "hidden_states": call["hidden_states"],
            "audio_hidden_states": call["audio_hidden_states"],
            "encoder_hidden_states": text,
            "audio_encoder_hidden_states": sound,
            "timestep": of_video,
            "audio_timestep": of_audio,
        }
        if self.prompt_modulation:
            found |= {"sigma": sigma, "audio_sigma": audio_sigma}
        for name, of in (("encoder_attention_mask", text), ("audio_encoder_attention_mask", sound)):
            found[name] = seen_text(call.get(name), of)
        return found | self._coordinates(call)

    def _refuse_what_no_graph_has(self, call: dict[str, Any], at_one_time: bool) -> None:
        """Refuse a call that stock computes in another way than the graph does."""
        for name in ("spatio_temporal_guidance_blocks", "video_self_attention_mask", "isolate_modalities"):
            given = call.get(name)
            if isinstance(given, torch.Tensor) or given:
                raise BadInputs(f"a call has {name}, which no graph computes; turn that guidance off while capturing")
        crossed = bool(call.get("use_cross_timestep"))
        if not at_one_time and crossed != self.prompt_modulation:
            raise BadInputs(
                f"use_cross_timestep is {crossed} where video and sound are at unlike times; "
                f"expected {self.prompt_modulation}, as the graph of this model has it"
            )

    def _coordinates(self, call: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return where each token begins and ends: as a pipeline says, or as stock finds it from sizes."""
        video, audio = call.get("video_coords"), call.get("audio_coords")
        batch = len(call["hidden_states"])
        if video is None:
            sizes = (call["num_frames"], call["height"], call["width"])
            device = call["hidden_states"].device
            video = self.rope.prepare_video_coords(batch, *sizes, device, fps=call.get("fps", 24.0))
        if audio is None:
            device = call["audio_hidden_states"].device
            audio = self.audio_rope.prepare_audio_coords(batch, call["audio_num_frames"], device)
        return {"video_coords": video.float(), "audio_coords": audio.float()}


def _given(value: torch.Tensor | None, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise if value is None else value


def _of_batch(name: str, times: torch.Tensor) -> torch.Tensor:
    """Return times as one of each video, FP32 [batch].

    Raises:
        BadInputs: they differ between the tokens of a video.
    """
    each = times.float().reshape(len(times), -1)
    if not torch.equal(each, each[:, :1].expand_as(each)):
        raise BadInputs(
            f"{name} differs between the tokens of a video, as from a picture to video; expected one time for all"
        )
    return each[:, 0]
