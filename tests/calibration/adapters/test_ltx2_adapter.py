"""LTX-2 driven as its pipelines drive it: what its graph does not compute is refused, and computed as stock does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from calibration.adapters.ltx2 import LTX2
from calibration.inputs.captured import capturing, check_inputs, partial_schedule
from fp4trt.errors import BadInputs
from fp4trt.families import family_of
from tests.frame.diffusers_models import MODELS

SIZES = (2, 8, 8)
PER_TOKEN = 1000 * torch.tensor([[0.0] * 8 + [0.5] * 24] * 2)
OTHER_GRAPHS: dict[str, tuple[dict[str, Any], str]] = {
    "skipped attentions": ({"spatio_temporal_guidance_blocks": [1]}, "spatio_temporal_guidance_blocks"),
    "no sound for the video": ({"isolate_modalities": True}, "isolate_modalities"),
    "masked video": ({"video_self_attention_mask": torch.ones(2, 32, 32).tril()}, "video_self_attention_mask"),
    "a time for each token": (
        {"timestep": PER_TOKEN, "audio_timestep": torch.full((2,), 500.0)},
        "timestep differs between the tokens",
    ),
}


def _call(name: str) -> dict[str, Any]:
    return dict(MODELS[name].call(MODELS[name].config, SIZES).kwargs)


@pytest.mark.parametrize("kind", OTHER_GRAPHS)
def test_what_no_graph_computes_is_computed_as_diffusers_does_and_not_captured(kind: str) -> None:
    model, (changes, words) = MODELS["ltx2.3"], OTHER_GRAPHS[kind]
    stock = model.make(torch.float32)
    adapter = LTX2(**model.config)
    adapter.load_state_dict(stock.state_dict())
    plain = _call("ltx2.3")
    call = {**plain, **adapter.inputs_of(**plain), **changes}
    with torch.no_grad():
        wanted, found = (one(**call, return_dict=False) for one in (stock, adapter))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInputs, match=words), capturing(adapter, family_of(_config("ltx2.3")), _config("ltx2.3")):
        adapter(**call)


def _config(name: str) -> dict[str, Any]:
    return {**MODELS[name].config, "_class_name": MODELS[name].class_name}


@pytest.mark.parametrize(("name", "other"), [("ltx2", True), ("ltx2.3", False)])
def test_the_flag_of_the_other_generation_is_refused_where_it_makes_a_difference(name: str, other: bool) -> None:
    adapter = LTX2(**MODELS[name].config)
    call = {**_call(name), "audio_timestep": torch.tensor([100.0, 200.0]), "audio_sigma": torch.tensor([100.0, 200.0])}
    with pytest.raises(BadInputs, match=f"use_cross_timestep is {other} where .* expected {not other}"):
        adapter.inputs_of(**call | {"use_cross_timestep": other})
    assert adapter.inputs_of(**call | {"use_cross_timestep": not other})["audio_timestep"].tolist() == [100, 200]
    at_one_time = call | dict.fromkeys(("audio_timestep", "audio_sigma"), call["timestep"])
    adapter.inputs_of(**at_one_time | {"use_cross_timestep": other})


def test_a_call_without_masks_and_with_one_time_for_all_tokens_is_captured() -> None:
    call = _call("ltx2")
    wanted = LTX2(**MODELS["ltx2"].config).inputs_of(**call)
    for name in ("encoder_attention_mask", "audio_encoder_attention_mask"):
        del call[name]
    call |= {"timestep": call["timestep"][:, None].expand(2, 32), "audio_timestep": call["timestep"]}
    found = LTX2(**MODELS["ltx2"].config).inputs_of(**call)
    assert torch.equal(found["timestep"], wanted["timestep"])
    assert found["encoder_attention_mask"].dtype == torch.bool
    assert found["encoder_attention_mask"].all()


def test_times_are_steps_of_a_scheduler() -> None:
    family, config = family_of(_config("ltx2")), _config("ltx2")
    calls = [LTX2(**MODELS["ltx2"].config).inputs_of(**_call("ltx2"))]
    checked = check_inputs(calls, family, config)
    assert checked[0]["timestep"].tolist() == [250, 750]
    assert partial_schedule(checked, family) is not None
    assert "between timestep 250.00 and 750.00" in str(partial_schedule(checked, family))
    with pytest.raises(BadInputs, match=r"timestep holds 1001; this model takes 0 \(picture\) to 1000 \(noise\)"):
        check_inputs([{**calls[0], "timestep": torch.tensor([1001.0, 5.0])}], family, config)


def test_example_coordinates_are_those_that_diffusers_makes() -> None:
    sizes = {"B": 2, "L": 32, "T": 8, "A": 5}
    adapter, found = LTX2(**MODELS["ltx2"].config), family_of(_config("ltx2")).positions(sizes)
    video = adapter.rope.prepare_video_coords(2, 4, 2, 4, torch.device("cpu"), fps=24.0)
    audio = adapter.audio_rope.prepare_audio_coords(2, 5, torch.device("cpu"))
    torch.testing.assert_close(torch.from_numpy(found["audio_coords"]), audio)
    torch.testing.assert_close(torch.from_numpy(found["video_coords"]), video)
