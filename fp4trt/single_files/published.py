"""Configs of published models, by a name for people, as far as they decide names, shapes and the graph.

Sources: the models' own ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["PUBLISHED"]

_FLUX1: Final[dict[str, Any]] = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}

_FLUX2: Final[dict[str, Any]] = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-6,
    "guidance_embeds": True,
    "in_channels": 128,
    "joint_attention_dim": 15360,
    "mlp_ratio": 3.0,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}

_QWEN: Final[dict[str, Any]] = {
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
}

_LTX2: Final[dict[str, Any]] = {
    "_class_name": "LTX2VideoTransformer3DModel",
    "attention_head_dim": 128,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_in_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_out_channels": 128,
    "caption_channels": 3840,
    "cross_attention_dim": 4096,
    "in_channels": 128,
    "num_attention_heads": 32,
    "num_layers": 48,
    "out_channels": 128,
    "rope_type": "split",
}

PUBLISHED: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "ChromaTransformer2DModel": {
        "Chroma": {
            "_class_name": "ChromaTransformer2DModel",
            "approximator_hidden_dim": 5120,
            "approximator_layers": 5,
            "approximator_num_channels": 64,
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "patch_size": 1,
        }
    },
    "FluxTransformer2DModel": {"FLUX.1": _FLUX1},
    "Flux2Transformer2DModel": {"FLUX.2": _FLUX2},
    "Flux3Transformer2DModel": {
        "FLUX.3": {
            "_class_name": "Flux3Transformer2DModel",
            "attention_head_dim": 128,
            "axes_dims_rope": [32, 32, 32, 32],
            "cond_in_channels": 128,
            "eps": 1e-6,
            "flow_map": False,
            "in_channels": 128,
            "joint_attention_dim": 20480,
            "mlp_ratio": 3.0,
            "num_attention_heads": 24,
            "num_layers": 5,
            "num_single_layers": 28,
            "rope_theta": 10000,
            "timestep_channels": 256,
        }
    },
    "Krea2Transformer2DModel": {
        "Krea 2": {
            "_class_name": "Krea2Transformer2DModel",
            "attention_head_dim": 128,
            "axes_dims_rope": [32, 48, 48],
            "in_channels": 64,
            "intermediate_size": 16384,
            "norm_eps": 1e-5,
            "num_attention_heads": 48,
            "num_key_value_heads": 12,
            "num_layers": 28,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "num_text_layers": 12,
            "rope_theta": 1000.0,
            "text_hidden_dim": 2560,
            "text_intermediate_size": 6912,
            "text_num_attention_heads": 20,
            "text_num_key_value_heads": 20,
            "timestep_embed_dim": 256,
        }
    },
    "LTX2VideoTransformer3DModel": {
        "LTX-2": _LTX2,
        "LTX-2.3": {
            **_LTX2,
            "audio_cross_attn_mod": True,
            "audio_gated_attn": True,
            "cross_attn_mod": True,
            "gated_attn": True,
            "use_prompt_embeddings": False,
        },
    },
    "QwenImageTransformer2DModel": {
        "Qwen-Image": _QWEN,
        "Qwen-Image-Edit-2511": {**_QWEN, "zero_cond_t": True},
        "Qwen-Image-Layered": {**_QWEN, "use_additional_t_cond": True, "use_layer3d_rope": True},
    },
    "SD3Transformer2DModel": {
        "SD3 medium": {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "in_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 24,
            "out_channels": 16,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "sample_size": 128,
        },
        "SD3.5 large": {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": 64,
            "caption_projection_dim": 2432,
            "in_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 38,
            "num_layers": 38,
            "out_channels": 16,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
            "sample_size": 128,
        },
        "SD3.5 medium": {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "dual_attention_layers": list(range(13)),
            "in_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 24,
            "out_channels": 16,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "sample_size": 128,
        },
    },
    "WanTransformer3DModel": {
        name: {
            "_class_name": "WanTransformer3DModel",
            "attention_head_dim": 128,
            "cross_attn_norm": True,
            "eps": 1e-6,
            "ffn_dim": inner,
            "freq_dim": 256,
            "in_channels": channels,
            "num_attention_heads": heads,
            "num_layers": layers,
            "out_channels": outputs,
            "patch_size": [1, 2, 2],
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": 4096,
        }
        for name, inner, channels, heads, layers, outputs in (
            ("Wan 1.3B", 8960, 16, 12, 30, 16),
            ("Wan 14B", 13824, 16, 40, 40, 16),
            ("Wan 2.2 I2V A14B", 13824, 36, 40, 40, 16),
            ("Wan 2.2 TI2V 5B", 14336, 48, 24, 30, 48),
        )
    },
    "ZImageTransformer2DModel": {
        "Z-Image": {
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
        }
    },
}
"""Class of diffusers to name to config."""
