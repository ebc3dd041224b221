"""Text encoders and VAEs of the published pipelines, for a transformer that lies in no pipeline's folder.

Elements are those of the classes of transformers 5 and diffusers 0.42 at the published configs, made on meta.
Which pipeline has which stands in its model_index.json, and in diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from generation.planning.components import Component, Decoder

__all__ = ["published_components", "transformers_of"]

_WO: Final = 24 * 4096 * 10240
"""Elements of the ``wo`` of a T5-XXL's 24 layers."""

CLIP_L: Final = Component("CLIP-L", "encode", 123_060_480)
CLIP_L_PROJECTED: Final = Component("CLIP-L", "encode", 123_650_304)
CLIP_G: Final = Component("CLIP-G", "encode", 694_659_840)
T5_XXL: Final = Component("T5-XXL", "encode", 4_762_310_656, kept_in_fp32=_WO)
UMT5_XXL: Final = Component("UMT5-XXL", "encode", 5_680_910_336, kept_in_fp32=_WO)
MISTRAL: Final = Component("Mistral Small 3 24B", "encode", 24_011_361_280)
QWEN3_4B: Final = Component("Qwen3 4B", "encode", 4_022_468_096)
QWEN3_8B: Final = Component("Qwen3 8B", "encode", 8_190_735_360)
QWEN25_VL_7B: Final = Component("Qwen2.5-VL 7B", "encode", 8_292_166_656)
QWEN3_VL_4B: Final = Component("Qwen3-VL 4B", "encode", 4_437_815_808)
GEMMA3_12B: Final = Component("Gemma 3 12B", "encode", 12_202_563_392)

VAE: Final = Component("VAE", "decode", 83_819_683, decoder=Decoder(256))
VAE_FLUX2: Final = Component("VAE", "decode", 84_046_115, decoder=Decoder(256))
VAE_QWEN: Final = Component("VAE", "decode", 126_892_531, decoder=Decoder(192))
VAE_WAN: Final = Component("VAE", "decode", 126_892_531, decoder=Decoder(192, 4))
VAE_WAN22: Final = Component("VAE", "decode", 704_688_668, decoder=Decoder(128, 4))
VAE_LTX2: Final = Component("VAE", "decode", 1_222_479_601, decoder=Decoder(8.5, None))

_LTX2: Final = (
    GEMMA3_12B,
    Component("connectors", "encode", 1_431_475_200),
    VAE_LTX2,
    Component("audio VAE", "decode", 53_248_146),
    Component("vocoder", "decode", 55_592_802),
)
_LTX23: Final = tuple(part if part.name != "connectors" else Component("connectors", "encode", None) for part in _LTX2)

_UNKNOWN: Final = (
    Component("text encoders", "encode", None),
    Component("VAE", "decode", None, decoder=Decoder(256, known=False)),
)
"""The components of a model that is no published one."""

_PIPELINES: Final[Mapping[str, tuple[tuple[str, int, tuple[Component, ...]], ...]]] = {
    "flux": (("joint_attention_dim", 4096, (CLIP_L, T5_XXL, VAE)),),
    "flux2": (
        ("joint_attention_dim", 15360, (MISTRAL, VAE_FLUX2)),
        ("joint_attention_dim", 7680, (QWEN3_4B, VAE_FLUX2)),
        ("joint_attention_dim", 12288, (QWEN3_8B, VAE_FLUX2)),
    ),
    "flux3": (("joint_attention_dim", 20480, (QWEN3_VL_4B, VAE_FLUX2)),),
    "qwen-image": (("joint_attention_dim", 3584, (QWEN25_VL_7B, VAE_QWEN)),),
    "z-image": (("cap_feat_dim", 2560, (QWEN3_4B, VAE)),),
    "krea2": (("text_hidden_dim", 2560, (QWEN3_VL_4B, VAE_QWEN)),),
    "sd3": (("joint_attention_dim", 4096, (CLIP_L_PROJECTED, CLIP_G, T5_XXL, VAE)),),
    "sd3.5-medium": (("joint_attention_dim", 4096, (CLIP_L_PROJECTED, CLIP_G, T5_XXL, VAE)),),
    "chroma": (("joint_attention_dim", 4096, (T5_XXL, VAE)),),
    "wan": (("text_dim", 4096, (UMT5_XXL, VAE_WAN)),),
    "wan-ti2v": (("text_dim", 4096, (UMT5_XXL, VAE_WAN22)),),
    "ltx2": (("caption_channels", 3840, _LTX2),),
}
"""Name of a family to a key of the config, the width of the text there, and what the pipeline of that width has."""

_WITHOUT_PIPELINE: Final = ("flux-digits",)


def published_components(family: str, config: Mapping[str, Any]) -> tuple[Component, ...]:
    """Return what the published pipeline of a transformer has beside it; of unknown size for any other transformer.

    FLUX.3's text encoder is that of its width: eight layers of Qwen3-VL 4B's 2560 channels.

    Args:
        family: its name.
        config: of the transformer.
    """
    if family in _WITHOUT_PIPELINE:
        return ()
    found = (parts for key, width, parts in _PIPELINES.get(family, ()) if config.get(key) == width)
    parts = next(found, _UNKNOWN)
    return _LTX23 if parts == _LTX2 and not config.get("use_prompt_embeddings", True) else parts


def transformers_of(family: str, config: Mapping[str, Any]) -> int:
    """Return how many transformers the published pipeline has, as far as the config of one tells."""
    return 2 if family == "wan" and config["in_channels"] == 36 else 1
