"""Configs of published models, by a name for people, as far as they decide names, shapes and the graph."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["PUBLISHED"]

_FLUX2: Final[dict[str, Any]] = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-6,
    "in_channels": 128,
    "mlp_ratio": 3.0,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}

PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "flux2-dev": {
        **_FLUX2,
        "guidance_embeds": True,
        "joint_attention_dim": 15360,
        "num_attention_heads": 48,
        "num_layers": 8,
        "num_single_layers": 48,
    },
    "klein-4b": {
        **_FLUX2,
        "guidance_embeds": False,
        "joint_attention_dim": 7680,
        "num_attention_heads": 24,
        "num_layers": 5,
        "num_single_layers": 20,
    },
    "qwen-image": {
        "_class_name": "QwenImageTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 3584,
        "num_attention_heads": 24,
        "num_layers": 60,
        "out_channels": 16,
        "patch_size": 2,
    },
    "z-image": {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": 2560,
        "dim": 3840,
        "in_channels": 16,
        "n_heads": 30,
        "n_kv_heads": 30,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    },
    "ltx-2": {
        "_class_name": "LTX2VideoTransformer3DModel",
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "in_channels": 128,
        "out_channels": 128,
        "cross_attention_dim": 4096,
        "audio_in_channels": 128,
        "audio_out_channels": 128,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048,
        "caption_channels": 3840,
        "num_layers": 48,
        "rope_type": "split",
    },
    "wan-14b": {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "ffn_dim": 13824,
        "num_layers": 40,
    },
}
