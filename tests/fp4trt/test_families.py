"""A family's data are those of the diffusers class."""

from __future__ import annotations

import pytest
import torch

from calibration.checkpoints.plain import find_source
from fp4trt.errors import BadCheckpoint
from fp4trt.families import family_of
from fp4trt.json_file import load_json


@pytest.mark.parametrize("changes", [{"guidance_embeds": True, "out_channels": 12, "patch_size": 2}, {}])
def test_the_state_of_flux_is_that_of_diffusers_in_names_shapes_and_order(changes: dict[str, object]) -> None:
    from diffusers import FluxTransformer2DModel

    sizes = {"in_channels": 64, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2}
    sizes |= {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 48}
    with torch.device("meta"):
        model = FluxTransformer2DModel(**sizes, pooled_projection_dim=32, **changes)
    config = {**model.config, "_class_name": "FluxTransformer2DModel"}
    family = family_of(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert list(family.state(config).items()) == list(wanted.items())
    linears = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert family.linears(config) == linears
    assert list(family.linears(config))[: len(family.quantized(config))] == list(family.quantized(config))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "flux-digits"),
        ({"num_layers": 1, "num_single_layers": 7}, "flux-digits"),
        ({"out_channels": 16, "axes_dims_rope": (16, 24, 24)}, "flux-digits"),
        ({"joint_attention_dim": 48}, "flux"),
        ({"pooled_projection_dim": 32}, "flux"),
        ({"num_attention_heads": 4}, "flux"),
        ({"guidance_embeds": False}, "flux"),
        ({"in_channels": 64}, "flux"),
    ],
)
def test_the_built_in_model_is_known_by_all_of_its_config_but_its_depth(changes: dict[str, object], name: str) -> None:
    config = load_json(find_source("digits") / "config.json")
    assert family_of({**config, **changes}).name == name


_SD3 = {
    "_class_name": "SD3Transformer2DModel", "in_channels": 16, "patch_size": 2, "pos_embed_max_size": 96,
    "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32,
    "joint_attention_dim": 48, "pooled_projection_dim": 16, "dual_attention_layers": (), "qk_norm": "rms_norm",
}  # fmt: skip
_CHROMA = {
    "_class_name": "ChromaTransformer2DModel", "in_channels": 16, "patch_size": 1, "num_layers": 1,
    "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 48, "approximator_num_channels": 64, "approximator_hidden_dim": 32,
    "approximator_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (_SD3, "sd3"),
        ({**_SD3, "qk_norm": None, "dual_attention_layers": []}, "sd3"),
        ({**_SD3, "dual_attention_layers": [0]}, "sd3.5-medium"),
        (_CHROMA, "chroma"),
    ],
)
def test_a_config_has_its_family(config: dict[str, object], name: str) -> None:
    assert family_of(config).name == name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"_class_name": "QwenImageTransformer2DModel", "guidance_embeds": True},
            "guidance_embeds is true, expected false",
        ),
        ({**_SD3, "qk_norm": "layer_norm"}, "qk_norm is 'layer_norm', expected null or 'rms_norm'"),
        ({**_SD3, "pos_embed_max_size": None}, "pos_embed_max_size is None, expected a whole number"),
        ({**_SD3, "caption_projection_dim": 64}, "caption_projection_dim is 64, expected the blocks' width, 32"),
        (
            {**_SD3, "dual_attention_layers": [1, 3]},
            r"dual_attention_layers is \[1, 3\], expected numbers of blocks, 0",
        ),
        ({**_SD3, "dual_attention_layers": 1}, "dual_attention_layers is 1, expected numbers of blocks"),
        ({**_SD3, "num_layers": 0}, "num_layers is 0, expected a whole number above 0"),
        ({**_CHROMA, "approximator_num_channels": 66}, "approximator_num_channels is 66, expected a multiple of 4"),
        ({**_CHROMA, "approximator_layers": None}, "approximator_layers is None, expected a whole number"),
        ({**_CHROMA, "axes_dims_rope": (8, 8)}, r"axes_dims_rope is \(8, 8\), expected three even numbers"),
    ],
)
def test_a_config_of_an_unknown_kind_is_refused_by_its_key(config: dict[str, object], words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        family_of(config)


WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "ffn_dim": 8960,
    "num_layers": 30,
}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "wan"),
        ({"in_channels": 36, "image_dim": None, "added_kv_proj_dim": None}, "wan"),
        ({"in_channels": 48, "out_channels": 48}, "wan-ti2v"),
        ({"in_channels": 48}, "wan"),
    ],
)
def test_a_wan_whose_tokens_have_timesteps_is_known_by_its_channels(changes: dict[str, object], name: str) -> None:
    assert family_of({**WAN, **changes}).name == name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_dim": 1280}, "image_dim is 1280, as in Wan 2.1 from image to video, which is not supported"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim is 5120, as in Wan 2.1"),
        ({"patch_size": [1, 4, 4]}, "patch_size is [1, 4, 4], expected [1, 2, 2]"),
        ({"patch_size": 2}, "patch_size is 2, expected [1, 2, 2]"),
        ({"num_layers": 0}, "num_layers is 0, expected a whole number above 0"),
        ({"ffn_dim": None}, "ffn_dim is None, expected a whole number above 0"),
        ({"attention_head_dim": 127}, "attention_head_dim is 127, expected an even number"),
        ({"attention_head_dim": "128"}, "attention_head_dim is '128', expected a whole number above 0"),
    ],
)
def test_a_wan_that_no_graph_is_made_of_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadCheckpoint) as refused:
        family_of({**WAN, **changes})
    assert words in str(refused.value)
    advice = "take Wan 2.2 (I2V-A14B or TI2V-5B)" if "Wan 2.1" in words else "take the one that belongs to the weights"
    assert str(refused.value).endswith(advice)
