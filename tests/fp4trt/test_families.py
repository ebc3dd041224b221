"""A family's data are those of the diffusers class."""

from __future__ import annotations

import pytest
import torch

from calibration.checkpoints.plain import find_source
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
