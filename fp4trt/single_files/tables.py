"""The names of each class of models in single files. Source: diffusers' ``loaders/single_file_utils.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fp4trt.single_files.names import SingleFile, block
from fp4trt.single_files.published import PUBLISHED

__all__ = ["SINGLE_FILES"]

_QKV: Final = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV: Final = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_DOUBLE: Final[Mapping[str, tuple[str, ...] | str]] = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED_QKV,
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
"""Names in a double block of FLUX.1, FLUX.2 and Chroma."""

_MLP: Final = {
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_SINGLE_NORMS: Final = {
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_SINGLE: Final[Mapping[str, tuple[str, ...] | str]] = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": "proj_out",
    **_SINGLE_NORMS,
}
_EMBEDDERS: Final = {"img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",)}
_LAST_NORM: Final = {"final_layer.adaLN_modulation.1": ("norm_out.linear",)}


def _embedder(original: str, path: str) -> dict[str, tuple[str, ...]]:
    return {f"{original}.in_layer": (f"{path}.linear_1",), f"{original}.out_layer": (f"{path}.linear_2",)}


_FLUX_HEAD: Final = {
    "attention_head_dim": ("transformer_blocks.0.attn.norm_q.weight", 0),
    "in_channels": ("x_embedder.weight", 1),
    "joint_attention_dim": ("context_embedder.weight", 1),
    "width": ("x_embedder.weight", 0),
}
FLUX1: Final = SingleFile(
    names={
        **_EMBEDDERS,
        **_LAST_NORM,
        **_embedder("time_in", "time_text_embed.timestep_embedder"),
        **_embedder("vector_in", "time_text_embed.text_embedder"),
        **_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        **block(
            "double_blocks.*",
            "transformer_blocks.*",
            {**_DOUBLE, **_MLP, "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"},
        ),
        **block("single_blocks.*", "single_transformer_blocks.*", {**_SINGLE, "modulation.lin": "norm.linear"}),
    },
    key="double_blocks.0.img_mod.lin.weight",
    swapped=("norm_out.linear",),
    sizes={
        **_FLUX_HEAD,
        "out_channels": ("proj_out.weight", 0),
        "pooled_projection_dim": ("time_text_embed.text_embedder.linear_1.weight", 1),
    },
    counts={
        "num_layers": "transformer_blocks.*.norm1.linear.weight",
        "num_single_layers": "single_transformer_blocks.*.norm.linear.weight",
    },
    present={"guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight"},
    published=PUBLISHED["FluxTransformer2DModel"],
)

FLUX2: Final = SingleFile(
    names={
        **_EMBEDDERS,
        **_LAST_NORM,
        **_embedder("time_in", "time_guidance_embed.timestep_embedder"),
        **_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
        "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
        "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
        **block(
            "double_blocks.*",
            "transformer_blocks.*",
            {
                **_DOUBLE,
                "img_mlp.0": "ff.linear_in",
                "img_mlp.2": "ff.linear_out",
                "txt_mlp.0": "ff_context.linear_in",
                "txt_mlp.2": "ff_context.linear_out",
            },
        ),
        **block(
            "single_blocks.*",
            "single_transformer_blocks.*",
            {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out", **_SINGLE_NORMS},
        ),
    },
    key="single_stream_modulation.lin.weight",
    swapped=("norm_out.linear",),
    sizes=_FLUX_HEAD,
    counts={
        "num_layers": "transformer_blocks.*.attn.norm_q.weight",
        "num_single_layers": "single_transformer_blocks.*.attn.norm_q.weight",
    },
    present={"guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight"},
    published=PUBLISHED["Flux2Transformer2DModel"],
)

_FLUX3_BLOCK: Final = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
FLUX3: Final = SingleFile(
    names={
        "final_layer.image.linear": ("proj_out",),
        "final_layer.image.adaLN_modulation.1": ("norm_out.linear",),
        **_embedder("time_in", "timestep_embedder"),
        **_embedder("ref_time_in", "target_timestep_embedder"),
        "emb_in.*": ("x_embedders.*",),
        "txt_in": ("context_embedder",),
        "early_stream_modulations.*.lin": ("early_stream_modulations.*.linear",),
        "single_stream_modulations.*.lin": ("single_stream_modulations.*.linear",),
        **block("content_mode_blocks.*", "mode_blocks.*", _FLUX3_BLOCK),
        **block("single_blocks.*", "single_transformer_blocks.*", _FLUX3_BLOCK),
        **block("txt_blocks.*", "txt_blocks.*", _FLUX3_BLOCK),
    },
    key="early_stream_modulations.image.lin.weight",
    swapped=("norm_out.linear",),
    ignored=("repa_projectors.",),
    sizes={
        "attention_head_dim": ("single_transformer_blocks.0.attn.norm_q.weight", 0),
        "in_channels": ("x_embedders.image.weight", 1),
        "cond_in_channels": ("x_embedders.image_cond.weight", 1),
        "joint_attention_dim": ("context_embedder.weight", 1),
        "width": ("context_embedder.weight", 0),
    },
    counts={
        "num_layers": "mode_blocks.image.*.attn.norm_q.weight",
        "num_single_layers": "single_transformer_blocks.*.attn.norm_q.weight",
    },
    present={"flow_map": "target_timestep_embedder.linear_1.weight"},
    published=PUBLISHED["Flux3Transformer2DModel"],
)

CHROMA: Final = SingleFile(
    names={
        **_EMBEDDERS,
        "distilled_guidance_layer.layers.*.in_layer": ("distilled_guidance_layer.layers.*.linear_1",),
        "distilled_guidance_layer.layers.*.out_layer": ("distilled_guidance_layer.layers.*.linear_2",),
        "distilled_guidance_layer.norms.*.scale": ("distilled_guidance_layer.norms.*.weight",),
        **block("double_blocks.*", "transformer_blocks.*", {**_DOUBLE, **_MLP}),
        **block("single_blocks.*", "single_transformer_blocks.*", _SINGLE),
    },
    key="distilled_guidance_layer.norms.0.scale",
    sizes={
        **_FLUX_HEAD,
        "out_channels": ("proj_out.weight", 0),
        "approximator_num_channels": ("distilled_guidance_layer.in_proj.weight", 1),
        "approximator_hidden_dim": ("distilled_guidance_layer.in_proj.weight", 0),
    },
    counts={
        "num_layers": "transformer_blocks.*.attn.norm_q.weight",
        "num_single_layers": "single_transformer_blocks.*.attn.norm_q.weight",
        "approximator_layers": "distilled_guidance_layer.norms.*.weight",
    },
    published=PUBLISHED["ChromaTransformer2DModel"],
)

_SD3_ATTENTION: Final = {"ln_q": "norm_q", "ln_k": "norm_k", "proj": "to_out.0"}
SD3: Final = SingleFile(
    names={
        "pos_embed": ("pos_embed.pos_embed",),
        "x_embedder.proj": ("pos_embed.proj",),
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        **_LAST_NORM,
        **block(
            "joint_blocks.*",
            "transformer_blocks.*",
            {
                "x_block.attn.qkv": _QKV,
                "context_block.attn.qkv": _ADDED_QKV,
                "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
                **{f"x_block.{at}.{a}": f"{at}.{b}" for at in ("attn", "attn2") for a, b in _SD3_ATTENTION.items()},
                "context_block.attn.ln_q": "attn.norm_added_q",
                "context_block.attn.ln_k": "attn.norm_added_k",
                "context_block.attn.proj": "attn.to_add_out",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
            },
        ),
    },
    key="joint_blocks.0.context_block.adaLN_modulation.1.weight",
    swapped=("norm_out.linear", "transformer_blocks.<last>.norm1_context.linear"),
    sizes={
        "in_channels": ("pos_embed.proj.weight", 1),
        "width": ("pos_embed.proj.weight", 0),
        "joint_attention_dim": ("context_embedder.weight", 1),
        "caption_projection_dim": ("context_embedder.weight", 0),
        "pooled_projection_dim": ("time_text_embed.text_embedder.linear_1.weight", 1),
    },
    counts={"num_layers": "transformer_blocks.*.norm1.linear.weight"},
    published=PUBLISHED["SD3Transformer2DModel"],
)

QWEN: Final = SingleFile(
    names={},
    key="transformer_blocks.0.img_mod.1.weight",
    sizes={
        "attention_head_dim": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "in_channels": ("img_in.weight", 1),
        "joint_attention_dim": ("txt_in.weight", 1),
        "width": ("img_in.weight", 0),
    },
    counts={"num_layers": "transformer_blocks.*.img_mod.1.weight"},
    published=PUBLISHED["QwenImageTransformer2DModel"],
)

Z_IMAGE: Final = SingleFile(
    names={
        "final_layer.*": ("all_final_layer.2-1.*",),
        "x_embedder": ("all_x_embedder.2-1",),
        "*.attention.qkv": ("*.attention.to_q", "*.attention.to_k", "*.attention.to_v"),
        "*.attention.out": ("*.attention.to_out.0",),
        "*.attention.q_norm": ("*.attention.norm_q",),
        "*.attention.k_norm": ("*.attention.norm_k",),
    },
    key="layers.0.attention.qkv.weight",
    ignored=("norm_final.",),
    sizes={"cap_feat_dim": ("cap_embedder.1.weight", 1), "dim": ("cap_embedder.1.weight", 0)},
    counts={
        "n_layers": "layers.*.attention.norm_q.weight",
        "n_refiner_layers": "noise_refiner.*.attention.norm_q.weight",
    },
    published=PUBLISHED["ZImageTransformer2DModel"],
)

_WAN_ATTENTION: Final = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
WAN: Final = SingleFile(
    names={
        "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
        "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
        "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
        "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
        "time_projection.1": ("condition_embedder.time_proj",),
        "head.modulation": ("scale_shift_table",),
        "head.head": ("proj_out",),
        **block(
            "blocks.*",
            "blocks.*",
            {
                **{f"self_attn.{a}": f"attn1.{b}" for a, b in _WAN_ATTENTION.items()},
                **{f"cross_attn.{a}": f"attn2.{b}" for a, b in _WAN_ATTENTION.items()},
                "modulation": "scale_shift_table",
                "ffn.0": "ffn.net.0.proj",
                "ffn.2": "ffn.net.2",
                "norm3": "norm2",
            },
        ),
    },
    key="head.modulation",
    sizes={
        "in_channels": ("patch_embedding.weight", 1),
        "width": ("patch_embedding.weight", 0),
        "text_dim": ("condition_embedder.text_embedder.linear_1.weight", 1),
        "ffn_dim": ("blocks.0.ffn.net.0.proj.weight", 0),
    },
    counts={"num_layers": "blocks.*.ffn.net.0.proj.weight"},
    published=PUBLISHED["WanTransformer3DModel"],
)

LTX2: Final = SingleFile(
    names={
        "patchify_proj": ("proj_in",),
        "audio_patchify_proj": ("audio_proj_in",),
        "adaln_single.*": ("time_embed.*",),
        "audio_adaln_single.*": ("audio_time_embed.*",),
        "prompt_adaln_single.*": ("prompt_adaln.*",),
        "audio_prompt_adaln_single.*": ("audio_prompt_adaln.*",),
        "av_ca_video_scale_shift_adaln_single.*": ("av_cross_attn_video_scale_shift.*",),
        "av_ca_a2v_gate_adaln_single.*": ("av_cross_attn_video_a2v_gate.*",),
        "av_ca_audio_scale_shift_adaln_single.*": ("av_cross_attn_audio_scale_shift.*",),
        "av_ca_v2a_gate_adaln_single.*": ("av_cross_attn_audio_v2a_gate.*",),
        "*.scale_shift_table_a2v_ca_video": ("*.video_a2v_cross_attn_scale_shift_table",),
        "*.scale_shift_table_a2v_ca_audio": ("*.audio_a2v_cross_attn_scale_shift_table",),
        "*.q_norm": ("*.norm_q",),
        "*.k_norm": ("*.norm_k",),
    },
    key="av_ca_a2v_gate_adaln_single.linear.weight",
    ignored=("video_embeddings_connector.", "audio_embeddings_connector.", "text_embedding_projection."),
    sizes={"in_channels": ("proj_in.weight", 1), "audio_in_channels": ("audio_proj_in.weight", 1)},
    counts={"num_layers": "transformer_blocks.*.scale_shift_table"},
    published=PUBLISHED["LTX2VideoTransformer3DModel"],
)

_KREA_BLOCK: Final = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "mlp.*": "ff.*",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
}
KREA2: Final = SingleFile(
    names={
        "first": ("img_in",),
        "tmlp.0": ("time_embed.linear_1",),
        "tmlp.2": ("time_embed.linear_2",),
        "tproj.1": ("time_mod_proj",),
        "txtmlp.0.scale": ("txt_in.norm.weight",),
        "txtmlp.1": ("txt_in.linear_1",),
        "txtmlp.3": ("txt_in.linear_2",),
        "last.linear": ("final_layer.linear",),
        "last.norm.scale": ("final_layer.norm.weight",),
        "last.modulation.lin": ("final_layer.scale_shift_table",),
        **block("blocks.*", "transformer_blocks.*", {**_KREA_BLOCK, "mod.lin": "scale_shift_table"}),
        **block("txtfusion.*", "text_fusion.*", _KREA_BLOCK),
        "txtfusion.projector": ("text_fusion.projector",),
    },
    key="txtfusion.projector.weight",
    sizes={
        "attention_head_dim": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "in_channels": ("img_in.weight", 1),
        "intermediate_size": ("transformer_blocks.0.ff.gate.weight", 0),
        "text_hidden_dim": ("txt_in.linear_1.weight", 1),
        "width": ("img_in.weight", 0),
    },
    counts={"num_layers": "transformer_blocks.*.attn.norm_q.weight"},
    published=PUBLISHED["Krea2Transformer2DModel"],
)

SINGLE_FILES: Final[Mapping[str, SingleFile]] = {
    "ChromaTransformer2DModel": CHROMA,
    "FluxTransformer2DModel": FLUX1,
    "Flux2Transformer2DModel": FLUX2,
    "Flux3Transformer2DModel": FLUX3,
    "Krea2Transformer2DModel": KREA2,
    "LTX2VideoTransformer3DModel": LTX2,
    "QwenImageTransformer2DModel": QWEN,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}
"""Class of diffusers to its names in single files."""
