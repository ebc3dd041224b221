"""Small models of diffusers' classes, and what their pipelines call them with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["MODELS", "Call", "Model"]

Sizes = tuple[int, int, int]
"""Pictures, rows of 4 tokens of each, and tokens of the text."""


@dataclass(frozen=True)
class Call:
    """A call as a pipeline makes it.

    Attributes:
        args, kwargs: of the transformer.
        tokens: (an output) as the graph gives it, [B, tokens, channels], without what is cut off.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tokens: Callable[[Any], torch.Tensor] = lambda result: result


@dataclass(frozen=True)
class Model:
    """A model.

    Attributes:
        class_name: of diffusers.
        config: what it is made with.
        call: (config, sizes) to a seeded call in FP32.
        same: whether the call's arguments are the family's inputs.
        gemms: how many FP4 GEMMs an engine of it has.
    """

    class_name: str
    config: Mapping[str, Any]
    call: Callable[[Mapping[str, Any], Sizes], Call]
    same: bool
    gemms: int

    def make(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Return a seeded model in eval mode, in which no norm or token is what a constructor makes of it."""
        import diffusers

        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, self.class_name)(**self.config)
        for name, value in model.named_parameters():
            if value.ndim < 2 or not name.endswith(("weight", "bias")):
                nn.init.normal_(value, 0.5 if name.endswith("weight") else 0.0, 0.1)
        for value in model.state_dict(keep_vars=True).values():  # not tables that no checkpoint has
            value.data = value.data.to(dtype)
        return model.eval()

    def save(self, folder: Path) -> None:
        """Write a checkpoint in BF16."""
        model: Any = self.make()
        model.save_pretrained(folder)


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _time(batch: int) -> torch.Tensor:
    return torch.linspace(0.25, 0.75, batch)


def _mask(batch: int, text: int) -> torch.Tensor:
    return torch.arange(text) < torch.tensor([[text - index - 1] for index in range(batch)])


def _grid(rows: int, axes: int) -> torch.Tensor:
    ids = torch.zeros(4 * rows, axes)
    ids[:, 1], ids[:, 2] = torch.arange(4 * rows) // 4, torch.arange(4 * rows) % 4
    return ids


def _patches(latents: torch.Tensor) -> torch.Tensor:
    """Return latents [B, C, F, H, W] as tokens [B, F * H / 2 * W / 2, 4 * C], (row, column, channel) in each."""
    patches = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return patches.permute(0, 2, 3, 5, 4, 6, 1).flatten(1, 3).flatten(2)


def _flux1(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    given = {
        "hidden_states": _normal(batch, 4 * rows, config["in_channels"]),
        "encoder_hidden_states": _normal(batch, text, config["joint_attention_dim"]),
        "pooled_projections": _normal(batch, config["pooled_projection_dim"]),
        "timestep": _time(batch),
        "img_ids": _grid(rows, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": 1 + _time(batch),
    }
    return Call((), given)


def _flux(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    words = torch.zeros(text, 4)
    words[:, 3] = torch.arange(text)
    given = {
        "hidden_states": _normal(batch, 4 * rows, config["in_channels"]),
        "encoder_hidden_states": _normal(batch, text, config["joint_attention_dim"]),
        "timestep": _time(batch),
        "img_ids": _grid(rows, 4),
        "txt_ids": words,
    }
    if config.get("flow_map") is None:
        given["guidance"] = 1 + _time(batch)
    return Call((), given)


def _qwen(shapes: Callable[[int], list[tuple[int, int, int]]]) -> Callable[[Mapping[str, Any], Sizes], Call]:
    def call(config: Mapping[str, Any], sizes: Sizes) -> Call:
        batch, rows, text = sizes
        given: dict[str, Any] = {
            "hidden_states": _normal(batch, 4 * rows, config["in_channels"]),
            "encoder_hidden_states": _normal(batch, text, config["joint_attention_dim"]),
            "encoder_hidden_states_mask": _mask(batch, text),
            "timestep": _time(batch),
            "img_shapes": [shapes(rows)] * batch,
        }
        if config.get("use_additional_t_cond"):
            given["additional_t_cond"] = torch.arange(batch) % 2
        return Call((), given)

    return call


def _z_image(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    latents = _normal(batch, config["in_channels"], 1, 2 * rows, 8)
    captions = _normal(batch, text, config["cap_feat_dim"])

    return Call((list(latents), _time(batch), list(captions)), {}, lambda result: _patches(torch.stack(result)))


def _krea(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    given = {
        "hidden_states": _normal(batch, 4 * rows, config["in_channels"]),
        "encoder_hidden_states": _normal(batch, text, config["num_text_layers"], config["text_hidden_dim"]),
        "timestep": _time(batch),
        "position_ids": torch.cat([torch.zeros(text, 3), _grid(rows, 3)]),
        "encoder_attention_mask": _mask(batch, text),
    }
    return Call((), given)


def _sd3(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    given = {
        "hidden_states": _normal(batch, config["in_channels"], 2 * rows, 8),
        "encoder_hidden_states": _normal(batch, text, config["joint_attention_dim"]),
        "pooled_projections": _normal(batch, config["pooled_projection_dim"]),
        "timestep": 1000 * _time(batch),
    }

    def tokens(result: torch.Tensor) -> torch.Tensor:
        patches = result.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)

    return Call((), given, tokens)


def _chroma(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    given = {
        "hidden_states": _normal(batch, 4 * rows, config["in_channels"]),
        "encoder_hidden_states": _normal(batch, text, config["joint_attention_dim"]),
        "timestep": _time(batch),
        "img_ids": _grid(rows, 3),
        "txt_ids": torch.zeros(text, 3),
        "attention_mask": torch.cat([_mask(batch, text), torch.ones(batch, 4 * rows, dtype=torch.bool)], dim=1),
    }
    return Call((), given)


def _wan(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    given = {
        "hidden_states": _normal(batch, config["in_channels"], 2, rows, 8),  # two frames of half as many rows
        "timestep": 1000 - 300 * torch.arange(batch),
        "encoder_hidden_states": _normal(batch, text, config["text_dim"]),
    }
    if config["in_channels"] == config["out_channels"] == 48:  # the first frame is given
        given["timestep"] = given["timestep"][:, None] * (torch.arange(4 * rows) >= 2 * rows)
    return Call((), given, _patches)


def _ltx(config: Mapping[str, Any], sizes: Sizes) -> Call:
    batch, rows, text = sizes
    widths = {"": "cross_attention_dim", "audio_": "audio_cross_attention_dim"}
    if config.get("use_prompt_embeddings", True):
        widths = dict.fromkeys(widths, "caption_channels")
    given = {
        "hidden_states": _normal(batch, 4 * rows, config["in_channels"]),
        "audio_hidden_states": _normal(batch, rows + 1, config["audio_in_channels"]),
        **{f"{of}encoder_hidden_states": _normal(batch, text, config[width]) for of, width in widths.items()},
        **{f"{of}encoder_attention_mask": _mask(batch, text).long() for of in widths},
        "timestep": 1000 * _time(batch),
        "sigma": 1000 * _time(batch),
        "num_frames": 2,
        "height": rows // 2,
        "width": 4,
        "fps": 25.0,
        "audio_num_frames": rows + 1,
        "use_cross_timestep": True,
    }
    if config.get("cross_attn_mod"):
        given |= dict.fromkeys(("audio_timestep", "audio_sigma"), 900 * _time(batch))
    return Call((), given)


_SD3 = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 48, "caption_projection_dim": 32, "pooled_projection_dim": 16,
    "patch_size": 2, "pos_embed_max_size": 25,
}  # fmt: skip

_LTX = {
    "in_channels": 16, "out_channels": 16, "num_attention_heads": 4, "attention_head_dim": 16,
    "cross_attention_dim": 64, "audio_in_channels": 16, "audio_out_channels": 16, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 16, "audio_cross_attention_dim": 32, "num_layers": 3, "caption_channels": 32,
    "rope_type": "split",
}  # fmt: skip

_QWEN = {
    "in_channels": 16, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16,
    "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip

_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 64, "num_layers": 3,
}  # fmt: skip

MODELS: dict[str, Model] = {
    "flux": Model(
        "FluxTransformer2DModel",
        {
            "in_channels": 16, "num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2,
            "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 32,
            "pooled_projection_dim": 32, "guidance_embeds": True,
        },
        _flux1, same=True, gemms=42,
    ),
    "flux2": Model(
        "Flux2Transformer2DModel",
        {
            "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2,
            "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 32,
            "timestep_guidance_channels": 32,
        },
        _flux, same=True, gemms=22,
    ),
    "flux3": Model(
        "Flux3Transformer2DModel",
        {
            "in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 3,
            "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 4, 4, 4),
            "joint_attention_dim": 32, "timestep_channels": 32, "flow_map": False,
        },
        _flux, same=True, gemms=21,
    ),
    "qwen-image": Model(
        "QwenImageTransformer2DModel", _QWEN, _qwen(lambda rows: [(1, rows, 4)]), same=False, gemms=27
    ),
    "qwen-image-edit-2511": Model(
        "QwenImageTransformer2DModel", {**_QWEN, "zero_cond_t": True},
        _qwen(lambda rows: [(1, rows - 1, 4), (1, 2, 2)]), same=False, gemms=27,
    ),
    "qwen-image-layered": Model(
        "QwenImageTransformer2DModel", {**_QWEN, "use_additional_t_cond": True, "use_layer3d_rope": True},
        _qwen(lambda rows: [(1, rows - 2, 4), (1, 1, 4), (1, 1, 4)]), same=False, gemms=27,
    ),
    "z-image": Model(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 96, "n_layers": 3, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 32, "axes_dims": [16, 16, 16], "axes_lens": [512, 64, 64],
        },
        _z_image, same=False, gemms=33,
    ),
    "ltx2": Model("LTX2VideoTransformer3DModel", _LTX, _ltx, same=False, gemms=60),
    "ltx2.3": Model(
        "LTX2VideoTransformer3DModel",
        {
            **_LTX, "rope_type": "interleaved", "use_prompt_embeddings": False, "perturbed_attn": True,
            **dict.fromkeys(("gated_attn", "audio_gated_attn", "cross_attn_mod", "audio_cross_attn_mod"), True),
        },
        _ltx, same=False, gemms=60,
    ),
    "krea2": Model(
        "Krea2Transformer2DModel",
        {
            "in_channels": 16, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "timestep_embed_dim": 32, "text_hidden_dim": 32,
            "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 64, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 6, 6),
        },
        _krea, same=False, gemms=12,
    ),
    "sd3": Model("SD3Transformer2DModel", _SD3, _sd3, same=False, gemms=37),
    "sd3.5-large": Model("SD3Transformer2DModel", {**_SD3, "qk_norm": "rms_norm"}, _sd3, same=False, gemms=37),
    "sd3.5-medium": Model(
        "SD3Transformer2DModel", {**_SD3, "num_layers": 3, "dual_attention_layers": (0, 2), "qk_norm": "rms_norm"},
        _sd3, same=False, gemms=31,
    ),
    "chroma": Model(
        "ChromaTransformer2DModel",
        {
            "in_channels": 16, "num_layers": 3, "num_single_layers": 3, "num_attention_heads": 2,
            "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 48,
            "approximator_num_channels": 64, "approximator_hidden_dim": 96, "approximator_layers": 2,
        },
        _chroma, same=False, gemms=30,
    ),
    "wan": Model("WanTransformer3DModel", _WAN, _wan, same=False, gemms=21),
    "wan-i2v": Model("WanTransformer3DModel", {**_WAN, "in_channels": 9}, _wan, same=False, gemms=21),
    "wan-ti2v": Model(
        "WanTransformer3DModel", {**_WAN, "in_channels": 48, "out_channels": 48}, _wan, same=False, gemms=21
    ),
}  # fmt: skip
