"""Adapters called as pipelines call them, with less, or more, than a graph takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibration.checkpoints.plain import model_class
from fp4trt.errors import BadInputs
from fp4trt.families import family_named
from tests.frame.diffusers_models import MODELS


@pytest.mark.parametrize(
    ("name", "given", "inputs"),
    [
        ("qwen-image", ("encoder_hidden_states_mask",), ("encoder_hidden_states_mask",)),
        ("krea2", ("encoder_attention_mask",), ("encoder_attention_mask",)),
        ("chroma", ("attention_mask",), ("encoder_attention_mask",)),
        ("ltx2", *[("encoder_attention_mask", "audio_encoder_attention_mask")] * 2),
    ],
)
def test_without_a_mask_all_of_the_text_is_seen(name: str, given: tuple[str, ...], inputs: tuple[str, ...]) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        adapter: Any = model_class(family_named(name))(**model.config)
    call = dict(model.call(model.config, (2, 8, 5)).kwargs)
    masked = adapter.inputs_of(**call)
    seen = adapter.inputs_of(**{key: value for key, value in call.items() if key not in given})
    for key in inputs:
        assert (masked[key].dtype, list(masked[key].sum(1))) == (torch.bool, [4, 3])
        assert torch.equal(seen[key], torch.ones(2, 5, dtype=torch.bool))


def test_a_call_of_qwen_image_with_guidance_is_refused() -> None:
    model = MODELS["qwen-image"]
    with torch.device("meta"):
        adapter: Any = model_class(family_named("qwen-image"))(**model.config, guidance_embeds=True)
    with pytest.raises(BadInputs, match=r"no embedding of; set guidance_embeds in config\.json to false"):
        adapter(**model.call(model.config, (1, 8, 5)).kwargs, guidance=torch.ones(1))
