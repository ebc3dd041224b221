"""Fused weights, bit for bit against diffusers' own loading and fusing with peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders import lora_pipeline

from calibration.lora.fusing import changed_weight
from calibration.lora.reading import read_lora
from fp4trt.families import family_of
from tests.calibration.lora.made_loras import KOHYA, PEFT, Tensors, fused, normal, pairs, saved, weights
from tests.frame.diffusers_models import MODELS

LOADERS = {
    "chroma": "FluxLoraLoaderMixin",
    "flux": "FluxLoraLoaderMixin",
    "flux2": "Flux2LoraLoaderMixin",
    "flux3": "Flux3LoraLoaderMixin",
    "krea2": "Krea2LoraLoaderMixin",
    "ltx2": "LTX2LoraLoaderMixin",
    "qwen-image": "QwenImageLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "wan": "WanLoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin",
}

FLUX_KOHYA = (
    "double_blocks.0.img_attn.qkv double_blocks.0.img_mlp.0 double_blocks.2.txt_mod.lin single_blocks.1.linear2"
).split()
FLUX2 = (
    "double_blocks.0.img_attn.qkv double_blocks.0.txt_attn.qkv double_blocks.1.img_attn.proj double_blocks.0.txt_mlp.0 "
    "single_blocks.0.linear1 single_blocks.1.linear2 img_in time_in.in_layer final_layer.linear"
).split()
QWEN = (
    "transformer_blocks.0.attn.to_q transformer_blocks.1.attn.add_k_proj transformer_blocks.0.attn.to_out.0 "
    "transformer_blocks.1.img_mlp.net.0.proj transformer_blocks.2.txt_mod.1 img_in"
).split()
Z_IMAGE = (
    "layers.0.attention.to_q layers.1.attention.qkv noise_refiner.0.feed_forward.w1 context_refiner.0.attention.to_v "
    "layers.0.adaLN_modulation.0 cap_embedder.1"
).split()
WAN_BLOCKS = [
    f"blocks.{block}.{part}_attn.{name}" for block in range(3) for part in ("self", "cross") for name in "qkvo"
]
WAN_BLOCKS += [f"blocks.{block}.ffn.{index}" for block in range(3) for index in (0, 2)]
WAN = ("blocks.0.self_attn.q blocks.1.ffn.2 head.head time_projection.1 text_embedding.0 text_embedding.2 "
       "time_embedding.0 time_embedding.2").split()  # fmt: skip
OWN = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "proj_out"]


def _biased(tensors: Tensors) -> Tensors:
    """Return pairs with a change of each bias, as extracted LoRAs of Wan have it."""
    ups = {key: value for key, value in tensors.items() if key.endswith("lora_up.weight")}
    biases = {key.replace("lora_up.weight", "diff_b"): normal(len(value)) for key, value in ups.items()}
    return tensors | biases


def _block_diagonal() -> Tensors:
    """Return kohya's LoRA of a fused module that consists of one of rank 2 for each of three parts."""
    key, up = "lora_unet_double_blocks_1_txt_attn_qkv", torch.zeros(96, 6, dtype=torch.float16)
    for part in range(3):
        up[part * 32 : part * 32 + 32, part * 2 : part * 2 + 2] = normal(32, 2)
    down = normal(6, 32, dtype=torch.float16)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(5.0)}


def _lokr(key: str, rows: int, columns: int) -> Tensors:
    return {
        f"{key}.lokr_w1": normal(4, 4),
        f"{key}.lokr_w2_a": normal(rows // 4, 2),
        f"{key}.lokr_w2_b": normal(2, columns // 4),
        f"{key}.alpha": torch.tensor(3.0),
    }


CASES: dict[str, tuple[str, Any]] = {
    "kohya": ("flux", lambda: pairs("flux", FLUX_KOHYA, "lora_unet_", KOHYA, 4, flat=True, alpha_dtype=torch.bfloat16)),
    "kohya, block-diagonal": ("flux", _block_diagonal),
    "diffusers": ("flux", lambda: pairs("flux", [*OWN, "x_embedder", "norm_out.linear"], "transformer.")),
    "diffusers with alpha": ("flux", lambda: pairs("flux", OWN, "transformer.", alpha=3, alpha_dtype=torch.bfloat16)),
    "diffusers, old": ("flux", lambda: pairs("flux", OWN, "transformer.", ("lora.down.weight", "lora.up.weight"))),
    "diffusers, of a model with fewer channels": (
        "flux",
        lambda: {
            "transformer.x_embedder.lora_A.weight": normal(4, 8),
            "transformer.x_embedder.lora_B.weight": normal(32, 4),
        },
    ),
    "DoRA of peft": (
        "flux",
        lambda: (
            pairs("flux", OWN[:1], "transformer.") | {f"transformer.{OWN[0]}.lora_magnitude_vector": 1 + normal(32)}
        ),
    ),
    "XLabs": (
        "flux",
        lambda: {
            key.replace("img_attn.qkv", "processor.qkv_lora1")
            .replace("txt_attn.proj", "processor.proj_lora2")
            .replace("single_blocks.0.linear2", "single_blocks.0.processor.proj_lora"): value
            for key, value in pairs(
                "flux",
                ["double_blocks.0.img_attn.qkv", "double_blocks.1.txt_attn.proj", "single_blocks.0.linear2"],
                "",
                ("down.weight", "up.weight"),
            ).items()
        },
    ),
    "OneTrainer": (
        "flux",
        lambda: pairs(
            "flux",
            [OWN[0], "transformer_blocks.0.attn.to_add_out", "x_embedder"],
            "lora_transformer_",
            KOHYA,
            4,
            flat=True,
            alpha_dtype=torch.bfloat16,
        ),
    ),
    "kohya of FLUX.2": ("flux2", lambda: pairs("flux2", FLUX2, "lora_unet_", KOHYA, 4, flat=True)),
    "ai-toolkit of FLUX.2": ("flux2", lambda: pairs("flux2", FLUX2, "diffusion_model.")),
    "peft of FLUX.2": ("flux2", lambda: pairs("flux2", FLUX2, "base_model.model.")),
    "LoKr of FLUX.2": ("flux2", lambda: _lokr("diffusion_model.double_blocks.0.img_attn.qkv", 96, 32)),
    "SimpleTuner's LoKr of FLUX.2": ("flux2", lambda: _lokr("lycoris_transformer_blocks_0_attn_to_q", 32, 32)),
    "FLUX.3": (
        "flux3",
        lambda: pairs("flux3", ["single_blocks.0.q_proj", "content_mode_blocks.image.0.mlp_in"], "diffusion_model."),
    ),
    "kohya of Qwen-Image": ("qwen-image", lambda: pairs("qwen-image", QWEN, "lora_unet_", KOHYA, 4, flat=True)),
    "ComfyUI of Qwen-Image": (
        "qwen-image",
        lambda: pairs("qwen-image", QWEN, "diffusion_model.", alpha=4, alpha_dtype=torch.bfloat16),
    ),
    "DiffSynth of Qwen-Image": (
        "qwen-image",
        lambda: pairs("qwen-image", QWEN, "", ("lora_A.default.weight", "lora_B.default.weight")),
    ),
    "kohya of Z-Image": ("z-image", lambda: pairs("z-image", Z_IMAGE, "lora_unet_", KOHYA, 4, flat=True)),
    "a fused module beside its parts": (
        "z-image",
        lambda: pairs(
            "z-image",
            [f"layers.1.attention.{part}" for part in ("qkv", "to_q", "to_k", "to_v")],
            "lora_unet_",
            KOHYA,
            flat=True,
        ),
    ),
    "LoKr of Z-Image": ("z-image", lambda: _lokr("diffusion_model.layers.0.attention.to_q", 96, 96)),
    "musubi-tuner of Wan": ("wan", lambda: pairs("wan", WAN_BLOCKS, "lora_unet_", KOHYA, 4, flat=True)),
    "ComfyUI of Wan": ("wan", lambda: pairs("wan", WAN_BLOCKS, "diffusion_model.", PEFT, 4)),
    "ComfyUI of Wan with biases": ("wan", lambda: _biased(pairs("wan", WAN, "diffusion_model.", KOHYA))),
    "ComfyUI of LTX-2": (
        "ltx2",
        lambda: pairs(
            "ltx2", ["transformer_blocks.0.attn1.to_q", "patchify_proj", "adaln_single.linear"], "diffusion_model."
        ),
    ),
    "ai-toolkit of Krea 2": (
        "krea2",
        lambda: pairs("krea2", ["blocks.0.attn.wq", "blocks.1.mlp.down", "txtfusion.projector"], "base_model.model."),
    ),
    "diffusers of SD3": (
        "sd3",
        lambda: (
            pairs("sd3", OWN[:2], "transformer.")
            | {
                "transformer.pos_embed.proj.lora_A.weight": normal(4, 4, 2, 2),
                "transformer.pos_embed.proj.lora_B.weight": normal(32, 4, 1, 1),
            }
        ),
    ),
    "diffusers of Chroma": ("chroma", lambda: pairs("chroma", OWN, "transformer.")),
}


def _by_diffusers(name: str, *loras: tuple[Path, float]) -> Tensors:
    """Return a small model's tensors after diffusers has loaded and fused LoRA files, in the dtypes that it holds."""
    loader: Any = getattr(lora_pipeline, LOADERS[name])

    class Pipeline(DiffusionPipeline, loader):  # type: ignore[misc]
        def __init__(self, transformer: Any, text_encoder: None = None, text_encoder_2: None = None) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, text_encoder=text_encoder, text_encoder_2=text_encoder_2)

    model: Any = MODELS[name].make()
    for key in set(getattr(model, "_keep_in_fp32_modules", None) or ()):  # as from_pretrained loads them
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == key:
                module.float()
    pipeline = Pipeline(model)
    names = [f"lora{index}" for index, _ in enumerate(loras)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for adapter, (path, _) in zip(names, loras, strict=True):
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=adapter)
        model.set_adapters(names, [strength for _, strength in loras])
        model.fuse_lora(adapter_names=names)
    model.unload_lora()
    found: Tensors = model.state_dict()
    return found


def _parts(state: Tensors) -> Tensors:
    """Return tensors with q, k and v apart, where diffusers has fused the model's own for a LoRA."""
    found = {}
    for name, value in state.items():
        for fused_name, parts in (
            ("to_qkv", ("to_q", "to_k", "to_v")),
            ("to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            if f".{fused_name}." in name:
                for part, rows in zip(parts, value.chunk(3), strict=True):
                    found[name.replace(fused_name, part)] = rows
        found.setdefault(name, value)
    return found


def _differing(name: str, expected: Tensors, got: Tensors) -> list[str]:
    """Return the tensors that differ, having checked that the LoRA changes those that it should."""
    base, expected = weights(name), _parts(expected)
    assert got
    assert {key for key in base if not torch.equal(expected[key].to(torch.bfloat16), base[key])} == got.keys()
    return [key for key, value in got.items() if not torch.equal(value, expected[key].to(torch.bfloat16))]


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_fused_as_diffusers_fuses_it(case: str, tmp_path: Path) -> None:
    name, make = CASES[case]
    path = saved(tmp_path, make())

    assert _differing(name, _by_diffusers(name, (path, 0.7)), fused(name, (path, 0.7))) == []


def test_several_files_are_fused_in_order(tmp_path: Path) -> None:
    first = saved(tmp_path, pairs("flux", FLUX_KOHYA, "lora_unet_", KOHYA, 4, flat=True), "first"), 0.7
    second = saved(tmp_path, pairs("flux", OWN, "transformer."), "second"), -1.3

    assert _differing("flux", _by_diffusers("flux", first, second), fused("flux", first, second)) == []


def test_alpha_and_rank_of_the_header_are_heeded(tmp_path: Path) -> None:
    tensors = pairs("flux", OWN, "transformer.")
    config = {
        "r": 8,
        "lora_alpha": 20,
        "use_rslora": True,
        "alpha_pattern": {OWN[0]: 3},
        "rank_pattern": {OWN[0]: 5, OWN[1]: 6, f"^{OWN[2]}": 7},
        "target_modules": OWN,
    }
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    path = saved(tmp_path, tensors, metadata=header)

    assert _differing("flux", _by_diffusers("flux", (path, 1.0)), fused("flux", (path, 1.0))) == []


def test_the_first_linear_of_a_single_block_is_taken_apart_as_diffusers_does(tmp_path: Path) -> None:
    """Its converter knows one width, so that but the four linears of that width are in memory."""
    width, rank = 3072, 4
    config = {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 64,
        "num_attention_heads": 24,
        "num_layers": 1,
        "num_single_layers": 1,
        "patch_size": 1,
        "pooled_projection_dim": 64,
    }
    key = "lora_unet_single_blocks_0_linear1"
    path = saved(
        tmp_path,
        {f"{key}.lora_down.weight": normal(rank, width), f"{key}.lora_up.weight": normal(7 * width, rank)},
    )
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(config)
    block = model.single_transformer_blocks[0]
    linears = {"proj_mlp": block.proj_mlp} | {
        f"attn.{part}": getattr(block.attn, part) for part in ("to_q", "to_k", "to_v")
    }
    base = {}
    for name, linear in linears.items():
        weight = torch.randn(linear.weight.shape, dtype=torch.bfloat16)
        linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        base[f"single_transformer_blocks.0.{name}.weight"] = weight
    state = lora_pipeline.FluxLoraLoaderMixin.lora_state_dict(str(path.parent), weight_name=path.name)
    model.load_lora_adapter(state, adapter_name="lora", low_cpu_mem_usage=True)
    model.fuse_lora()

    lora = read_lora(path, family_of(config), config)

    assert lora.changes.keys() == base.keys()
    for name, linear in linears.items():
        whole = f"single_transformer_blocks.0.{name}.weight"
        assert torch.equal(changed_weight(whole, base.__getitem__, [(lora.changes, 1.0)]), linear.weight)
