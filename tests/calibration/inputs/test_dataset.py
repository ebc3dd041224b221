"""Captured inputs: in which types and shapes they may come, and what is said of the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calibration.by_block.calibration import METADATA, calibrate
from calibration.inputs.captured import (
    Inputs,
    capturing,
    check_inputs,
    load_inputs,
    partial_schedule,
    save_inputs,
    warnings_of,
)
from fp4trt.errors import BadInputs
from fp4trt.families import family_of
from tests.frame.diffusers_models import MODELS

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
}
FAMILY = family_of(CONFIG)


def call_of(seed: int = 0, batch: int = 2) -> Inputs:
    """Return one call as a BF16 pipeline makes it, its floats such that FP16 holds them too."""
    call = FAMILY.example_inputs(CONFIG, (batch, 9, 5), seed, torch.bfloat16)
    return {name: value.half().to(value.dtype) for name, value in call.items()}


def refusal(call: Inputs) -> str:
    with pytest.raises(BadInputs) as refused:
        check_inputs([call_of(), call], FAMILY, CONFIG)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_of_any_width_become_what_the_model_computes_in(dtype: torch.dtype) -> None:
    wanted = call_of()
    given = {name: value.to(dtype) for name, value in wanted.items()}
    found = check_inputs([wanted, given], FAMILY, CONFIG)
    for name, value in wanted.items():
        assert found[1][name].dtype == (torch.float32 if name in ("img_ids", "txt_ids", "guidance") else torch.bfloat16)
        assert torch.equal(found[1][name], value)


def test_ids_may_be_whole_numbers_and_have_the_dimension_of_a_batch() -> None:
    wanted = call_of()
    given = wanted | {name: wanted[name].long()[None].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    found = check_inputs([given], FAMILY, CONFIG)[0]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    ids = torch.stack([wanted["img_ids"], wanted["img_ids"] + 1])
    assert "call 1: img_ids has shape [2, 9, 3] and differs between the pictures" in refusal(wanted | {"img_ids": ids})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"img_ids": torch.zeros(4, 3)}, "img_ids has shape [4, 3]; expected [9, 3], as hidden_states has 9 image"),
        (
            {"txt_ids": torch.zeros(6, 3)},
            "txt_ids has shape [6, 3]; expected [5, 3], as encoder_hidden_states has 5",
        ),
        ({"timestep": torch.ones(1)}, "timestep has shape [1]; expected [2], as hidden_states has a batch of 2"),
        (
            {"hidden_states": torch.zeros(2, 9, 48)},
            "hidden_states has shape [2, 9, 48]; this model takes ['B', 'L', 64",
        ),
        ({"hidden_states": torch.zeros(2, 0, 64)}, "hidden_states has shape [2, 0, 64]; expected no dimension of 0"),
        ({"hidden_states": torch.zeros(2, 9, 64).int()}, "hidden_states is int32; expected floating-point numbers"),
        ({"img_ids": torch.zeros(9, 3).bool()}, "img_ids is bool; expected floating-point numbers, such as float32"),
        ({"hidden_states": torch.full((2, 9, 64), torch.nan)}, "hidden_states holds NaN or infinite values"),
        (
            {"hidden_states": torch.full((2, 9, 64), 3.4e38)},
            "hidden_states holds 3.4e+38, which is beyond the range of",
        ),
        (
            {"timestep": torch.tensor([981.0, 1.0])},
            "timestep holds 981; this model takes 0 (picture) to 1 (noise): a",
        ),
        ({"timestep": torch.tensor([500, 500])}, "divides by 1000"),
        (
            {"timestep": torch.tensor([-0.25, 1.0])},
            "timestep holds -0.25; this model takes 0 (picture) to 1 (noise)",
        ),
        ({"image_rotary_emb": torch.ones(2)}, "has image_rotary_emb too; this model takes hidden_states, encoder_hid"),
    ],
)
def test_an_input_that_is_not_the_models_is_named_with_its_call(change: Inputs, words: str) -> None:
    told = refusal(call_of() | change)
    assert "call 1" in told
    assert words in told


def test_a_model_may_count_the_steps_of_a_scheduler() -> None:
    sizes = {"in_channels": 4, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    sizes |= {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16}
    config: dict[str, object] = {"_class_name": "SD3Transformer2DModel", "pos_embed_max_size": 8, **sizes}
    family = family_of(config)
    call = family.example_inputs(config, (2, 9, 5), 0, torch.bfloat16)
    assert call["timestep"].max() > 1
    whole = [{**call, "timestep": torch.tensor([time, time])} for time in (1000.0, 700.0, 400.0, 100.0)]
    assert partial_schedule(check_inputs(whole, family, config), family) is None
    told = partial_schedule(whole[2:], family)
    assert told is not None
    assert "no step between timestep 400.00 and 1000.00, of 1000 to 0" in told
    with pytest.raises(BadInputs, match=r"holds 1001; this model takes 0 \(picture\) to 1000 \(noise\): capture it"):
        check_inputs([{**call, "timestep": torch.tensor([1001.0, 1.0])}], family, config)


def test_more_tokens_than_the_model_declares_are_told_of() -> None:
    many, few = (
        FAMILY.example_inputs(CONFIG, (8, tokens, text), 0, torch.bfloat16) for tokens, text in ((9, 513), (9, 5))
    )
    (told,) = warnings_of(check_inputs([few, many], FAMILY, CONFIG), FAMILY, CONFIG)
    assert told.startswith("the calibration data go to 513 text tokens, beyond the 512 that the model declares")
    references = FAMILY.example_inputs(CONFIG, (8, 2 * 85 * 85, 5), 0, torch.bfloat16)
    assert warnings_of([references], FAMILY, CONFIG) == []


WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 32,
    "ffn_dim": 64,
    "num_layers": 1,
}


def steps(changes: dict[str, int], times: torch.Tensor) -> torch.Tensor:
    """Return the timesteps that a call of a Wan becomes."""
    config = {**WAN, **changes}
    family = family_of(config)
    call = family.example_inputs(config, (2, 4, 3), 0, torch.bfloat16)
    return check_inputs([call | {"timestep": times}], family, config)[0]["timestep"]


@pytest.mark.parametrize(
    ("changes", "times"),
    [({"in_channels": 36}, torch.tensor([1000, 0])), ({}, torch.tensor([[0, 0, 875, 875]] * 2))],
    ids=["of each video", "of each token"],
)
def test_timesteps_may_be_those_of_any_scheduler(changes: dict[str, int], times: torch.Tensor) -> None:
    """Whole ones of UniPC, and fractions of others."""
    for given in (times, times + 0.0, times * 0.987654):
        found = steps(changes, given)
        assert found.dtype == torch.float32
        assert torch.equal(found, given.float())


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([1001.0, 5.0], "timestep holds 1001; this model takes 0 (picture) to 1000 (noise): capture it again"),
        ([5.0, -1.0], "timestep holds -1; this model takes 0 (picture) to 1000"),
    ],
)
def test_another_timestep_than_a_schedulers_is_refused(times: list[float], words: str) -> None:
    with pytest.raises(BadInputs) as refused:
        steps({"in_channels": 16}, torch.tensor(times))
    assert words in str(refused.value)


def test_a_part_of_the_schedule_is_missed_in_a_schedulers_steps_too() -> None:
    """Where each token has a timestep, those of a given picture are 0 throughout."""
    calls = [{"timestep": torch.tensor([[0, time], [0, time]])} for time in (1000, 700, 400)]
    family = family_of(WAN)
    assert "between timestep 0.00 and 400.00, of 1000 to 0" in (partial_schedule(calls, family) or "")
    assert partial_schedule([*calls, {"timestep": torch.tensor([200])}], family) is None


def test_a_missing_input_is_named() -> None:
    call = call_of()
    del call["guidance"]
    assert "call 1 lacks guidance, which this model reads" in refusal(call)


def test_a_file_without_a_call_is_refused(tmp_path: Path) -> None:
    save_inputs(tmp_path / "inputs.safetensors", [call_of()])
    with pytest.raises(BadInputs, match="holds no call"):
        check_inputs(load_inputs(tmp_path / "inputs.safetensors")[:0], FAMILY, CONFIG)


@pytest.mark.parametrize(
    ("symbol", "found"),
    [
        ("B", "hidden_states has shape [0, 9, 64]"),
        ("L", "hidden_states has shape [2, 0, 64]"),
        ("T", "encoder_hidden_states has shape [2, 0, 32]"),
    ],
)
def test_an_empty_input_in_a_file_is_named_with_its_call(symbol: str, found: str, tmp_path: Path) -> None:
    call, shapes = call_of(), FAMILY.input_shapes(CONFIG)
    empty = {
        name: value.narrow(shapes[name].index(symbol), 0, 0).contiguous() if symbol in shapes[name] else value
        for name, value in call.items()
    }
    tensors = {
        f"0000{index}.{name}": value for index, each in enumerate([call_of(), empty]) for name, value in each.items()
    }
    save_file(tensors, tmp_path / "inputs.safetensors")
    stored = load_inputs(tmp_path / "inputs.safetensors")
    assert {name: value.shape for name, value in stored[1].items()} == {n: v.shape for n, v in empty.items()}
    with pytest.raises(BadInputs) as refused:
        check_inputs(stored, FAMILY, CONFIG)
    assert str(refused.value) == f"call 1: {found}; expected no dimension of 0: capture it again"


def test_a_folder_of_inputs_is_called_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInputs, match="is a folder; expected captured inputs"):
        load_inputs(tmp_path)


def test_captured_in_fp16_or_fp32_calibrates_as_in_bf16(tiny_flux: Callable[..., Path], tmp_path: Path) -> None:
    flux = tiny_flux(tmp_path / "flux")
    amax = {}
    for name, dtype in (("bf16", None), ("fp32", torch.float32), ("mixed", torch.float16)):
        calls = [call_of(seed) for seed in range(3)]
        if dtype is not None:
            calls[1:] = [{key: value.to(dtype) for key, value in call.items()} for call in calls[1:]]
        save_inputs(tmp_path / f"{name}.safetensors", calls)
        calibrate(flux, tmp_path / f"{name}.json", inputs=tmp_path / f"{name}.safetensors")
        amax[name] = json.loads((tmp_path / f"{name}.json").read_text())
        del amax[name][METADATA]
    assert amax["bf16"] == amax["fp32"] == amax["mixed"]
    assert len(amax["bf16"]) == 20 + 6


def test_one_value_that_was_expanded_is_kept(tmp_path: Path) -> None:
    save_inputs(tmp_path / "inputs.safetensors", [{"timestep": torch.tensor(0.5).bfloat16().expand(1).clone()}])
    assert load_inputs(tmp_path / "inputs.safetensors")[0]["timestep"].tolist() == [0.5]


def test_a_call_without_what_the_model_reads_is_told() -> None:
    model = MODELS["flux2"]
    config = {"_class_name": model.class_name, **model.config, "guidance_embeds": True}
    call = dict(model.call(model.config, (1, 4, 8)).kwargs) | {"guidance": None}
    transformer = model.make(torch.float32)
    with (
        pytest.raises(BadInputs, match="is called without guidance"),
        capturing(transformer, family_of(config), config),
    ):
        transformer(**call)
