"""Tiny pipelines of diffusers' classes, of random weights, whose text encoders and tokenizers are made here too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.frame.diffusers_models import MODELS

__all__ = ["PIPELINES", "save"]

WORDS = (
    "<pad>", "<s>", "</s>", "<unk>", "a", "cat", "dog", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
NUMBER = {word: index for index, word in enumerate(WORDS)}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['content'] if message['content'] is string else "
    "message['content'][0]['text'] }}<|im_end|>{% endfor %}"
)
LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": len(WORDS), "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SIGHT = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2,
}  # fmt: skip
SEEN = {
    f"{name}_token_id": NUMBER[f"<|{name}|>"] for name in ("vision_start", "vision_end")
} | {f"{name}_token_id": NUMBER[f"<|{name}_pad|>"] for name in ("image", "video")}  # fmt: skip


def save(name: str, folder: Path) -> None:
    """Write a pipeline as it lies in a folder that was downloaded."""
    torch.manual_seed(0)
    PIPELINES[name]().save_pretrained(str(folder))
    index = folder / "modular_model_index.json"
    if index.is_file():  # whose parts name where they are from
        index.write_text(index.read_text().replace(json.dumps(str(folder)), '"someone/pipeline"'))


def tokenizer() -> Any:
    split = Tokenizer(models.WordLevel(NUMBER, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, model_max_length=77, chat_template=CHAT, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", unk_token="<unk>", additional_special_tokens=list(WORDS[7:]),
        extra_special_tokens={"image_token": "<|image_pad|>"},
    )  # fmt: skip


def processor() -> Any:
    """One with Qwen2-VL's pictures that, unlike Qwen2VLProcessor, reads no videos and so needs no torchvision."""
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 4})
    return transformers.PaddleOCRVLProcessor(image_processor=pictures, tokenizer=tokenizer(), chat_template=CHAT)


def transformer(name: str, **changes: Any) -> Any:
    model = MODELS[name]
    return getattr(diffusers, model.class_name)(**{**model.config, **changes})


def language(width: int, layers: int) -> dict[str, Any]:
    return LANGUAGE | {"hidden_size": width, "head_dim": width // 2, "num_hidden_layers": layers}


def qwen3_vl(width: int, layers: int) -> Any:
    turns = {"rope_type": "default", "mrope_section": [width // 16, width // 16, width // 8]}
    sight = SIGHT | {"out_hidden_size": width, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = language(width, layers) | {"rope_scaling": turns}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=sight, **SEEN)


def qwen2_vl() -> Any:
    turns = {"rope_type": "default", "mrope_section": [2, 2, 4]}
    sight = SIGHT | {"window_size": 56, "out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = transformers.Qwen2_5_VLConfig(text_config=LANGUAGE | {"rope_scaling": turns}, vision_config=sight, **SEEN)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def t5(width: int, kind: str = "T5") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(WORDS)
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def clip() -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=16, projection_dim=8, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=len(WORDS), bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def vae() -> Any:
    return diffusers.AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, shift_factor=0.1)


def flux2_vae(channels: int) -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=channels, norm_num_groups=4,
    )  # fmt: skip


def video_vae(kind: str, channels: int, halvings: int = 1, in_time: bool = False, **others: Any) -> Any:
    return getattr(diffusers, kind)(
        base_dim=2, z_dim=channels, dim_mult=[1] * (halvings + 1), num_res_blocks=1,
        temperal_downsample=[in_time] * halvings, latents_mean=[0.0] * channels, latents_std=[1.0] * channels, **others,
    )  # fmt: skip


def qwen_vae(channels: int = 4, **others: Any) -> Any:
    return video_vae("AutoencoderKLQwenImage", channels, **others)


def klein() -> Any:
    text = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**language(16, 27)))
    model = transformer("flux2", joint_attention_dim=48, guidance_embeds=False)
    return diffusers.Flux2KleinPipeline(flow(), flux2_vae(16), text, tokenizer(), model)


def flux2() -> Any:
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**language(16, 30)),
        vision_config=transformers.PixtralVisionConfig(**sight, image_size=32, patch_size=8),
        image_token_index=NUMBER["<|image_pad|>"],
    )
    text = transformers.Mistral3ForConditionalGeneration(config)
    model = transformer("flux2", joint_attention_dim=48)
    # in place of PixtralProcessor, which needs torchvision, the tokenizer that it asks
    return diffusers.Flux2Pipeline(flow(), flux2_vae(16), text, tokenizer(), model)


def flux3(blocks: str, flow_map: bool) -> Any:
    pipeline = getattr(diffusers, blocks)().init_pipeline()
    pipeline.update_components(
        transformer=transformer("flux3", joint_attention_dim=8 * 16, flow_map=flow_map), vae=flux2_vae(4),
        text_encoder=transformers.Qwen3VLForConditionalGeneration(qwen3_vl(16, 32)), tokenizer=processor(),
    )  # fmt: skip
    return pipeline


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(flow(), qwen_vae(), qwen2_vl(), tokenizer(), transformer("qwen-image"))


def qwen_image_of_pictures(kind: str, model: Any, channels: int = 4, **others: Any) -> Any:
    """One whose VAE makes few latents of the megapixel that pictures are scaled to."""
    small = qwen_vae(channels, halvings=5, **others)
    return getattr(diffusers, kind)(flow(), small, qwen2_vl(), tokenizer(), processor(), model)


def z_image() -> Any:
    text = transformers.Qwen3Model(transformers.Qwen3Config(**LANGUAGE))
    return diffusers.ZImagePipeline(flow(), vae(), text, tokenizer(), transformer("z-image"))


def krea2() -> Any:
    text = transformers.Qwen3VLModel(qwen3_vl(32, 2))
    return diffusers.Krea2Pipeline(
        flow(), qwen_vae(), text, tokenizer(), transformer("krea2"), text_encoder_select_layers=(0, 1, 2)
    )


def sd3() -> Any:
    texts = (clip(), tokenizer(), clip(), tokenizer(), t5(48), tokenizer())
    return diffusers.StableDiffusion3Pipeline(transformer("sd3"), flow(), vae(), *texts)


def chroma() -> Any:
    return diffusers.ChromaPipeline(flow(), vae(), t5(48), tokenizer(), transformer("chroma"))


def wan(kind: str, channels: int, **others: Any) -> Any:
    latents = video_vae(
        "AutoencoderKLWan", channels, halvings=2, in_time=True, scale_factor_temporal=4, scale_factor_spatial=4
    )
    steps = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return getattr(diffusers, kind)(
        tokenizer=tokenizer(), text_encoder=t5(32, "UMT5"), vae=latents,
        scheduler=diffusers.UniPCMultistepScheduler(**steps), **others,
    )  # fmt: skip


def wan_twice(kind: str, name: str, **changes: Any) -> Any:
    both = {part: transformer(name, **changes) for part in ("transformer", "transformer_2")}
    return wan(kind, 4, boundary_ratio=0.8, **both)


def ltx2(name: str) -> Any:
    newer = name == "ltx2.3"
    text = transformers.Gemma3TextConfig(**LANGUAGE, layer_types=["full_attention"] * 2)
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=sight | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=NUMBER["<|image_pad|>"], boi_token_index=NUMBER["<|vision_start|>"],
        eoi_token_index=NUMBER["<|vision_end|>"],
    )  # fmt: skip
    heads = {"video_connector_num_attention_heads": 4 if newer else 2, "audio_connector_num_attention_heads": 2}
    sizes = {"attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": 8}
    both = {f"{of}_connector_{key}": value for of in ("video", "audio") for key, value in sizes.items()}
    return diffusers.LTX2Pipeline(
        scheduler=flow(), tokenizer=tokenizer(), text_encoder=transformers.Gemma3ForConditionalGeneration(config),
        connectors=LTX2TextConnectors(
            caption_channels=32, text_proj_in_factor=3, per_modality_projections=newer, video_hidden_dim=64,
            audio_hidden_dim=32, rope_type="split", **heads, **both,
        ), transformer=transformer(name), vae=diffusers.AutoencoderKLLTX2Video(
            latent_channels=16, block_out_channels=(8,), down_block_types=("LTX2VideoDownBlock3D",),
            decoder_block_out_channels=(8,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False), downsample_type=("spatiotemporal",),
            upsample_type=("spatiotemporal",), upsample_residual=(True,), upsample_factor=(2,),
            spatial_compression_ratio=8, temporal_compression_ratio=2,
        ), audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=16, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=4, mel_bins=16, resolution=16
        ), vocoder=LTX2Vocoder(
            in_channels=32, hidden_channels=8, upsample_kernel_sizes=[4], upsample_factors=[2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1]],
        ),
    )  # fmt: skip


PIPELINES: Mapping[str, Callable[[], Any]] = {
    "FLUX.2 dev": flux2,
    "FLUX.2 klein": klein,
    "FLUX.3": lambda: flux3("Flux3AutoBlocks", False),
    "FLUX.3 distilled": lambda: flux3("Flux3DistilledAutoBlocks", True),
    "Qwen-Image": qwen_image,
    "Qwen-Image-Edit": lambda: qwen_image_of_pictures("QwenImageEditPipeline", transformer("qwen-image")),
    "Qwen-Image-Edit-2511": lambda: qwen_image_of_pictures(
        "QwenImageEditPlusPipeline", transformer("qwen-image-edit-2511")
    ),
    "Qwen-Image-Layered": lambda: qwen_image_of_pictures(
        "QwenImageLayeredPipeline", transformer("qwen-image-layered", in_channels=32, out_channels=8), 8,
        input_channels=4,
    ),
    "Z-Image": z_image,
    "Krea 2": krea2,
    "SD3": sd3,
    "Chroma": chroma,
    "Wan 2.2 A14B": lambda: wan_twice("WanPipeline", "wan"),
    "Wan 2.2 A14B I2V": lambda: wan_twice("WanImageToVideoPipeline", "wan-i2v", in_channels=4 + 4 + 4),
    "Wan 2.2 TI2V-5B": lambda: wan("WanPipeline", 48, transformer=transformer("wan-ti2v"), expand_timesteps=True),
    "Wan 2.2 TI2V-5B of a picture": lambda: wan(
        "WanImageToVideoPipeline", 48, transformer=transformer("wan-ti2v"), expand_timesteps=True
    ),
    "LTX-2": lambda: ltx2("ltx2"),
    "LTX-2.3": lambda: ltx2("ltx2.3"),
}  # fmt: skip
