"""Sampling, capturing and comparing with the built-in model."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from calibration.digits.model import load_transformer
from calibration.digits.sampling import capture, denoise, noise, sample, schedule
from generation.comparison.digits import compare
from generation.comparison.metrics import psnr_db
from generation.comparison.statistics import estimate
from generation.demo.grid import grid

INPUTS = [
    "hidden_states",
    "encoder_hidden_states",
    "pooled_projections",
    "timestep",
    "img_ids",
    "txt_ids",
    "guidance",
]


@pytest.fixture(scope="module")
def transformer():
    return load_transformer()


@pytest.fixture(scope="module")
def roughened():
    """The model with its block weights rounded to three bits of mantissa, a stand-in for a quantized one."""
    model = load_transformer()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "transformer_blocks" in name:
                parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    return model


def test_the_schedule_goes_from_one_to_zero_in_bf16_numbers():
    times = schedule(10)
    assert (len(times), times[0], times[-1]) == (11, 1.0, 0.0)
    assert times == sorted(set(times), reverse=True)
    assert torch.tensor(times).bfloat16().tolist() == times


def test_the_same_seed_draws_the_same_latents(transformer):
    first, second = (sample(transformer, [0, 1, 2], seed=3, steps=2) for _ in range(2))
    assert torch.equal(first, second)


def test_another_seed_draws_other_latents(transformer):
    first, second = (sample(transformer, [0, 1, 2], seed=seed, steps=2) for seed in (3, 4))
    assert not torch.allclose(first, second, atol=0.1)


def test_the_batch_size_does_not_change_what_is_drawn(transformer):
    together = sample(transformer, range(6), seed=0, steps=2)
    in_fours = sample(transformer, range(6), seed=0, steps=2, batch_size=4)
    assert torch.allclose(together, in_fours, atol=1e-4)


def test_one_euler_step_of_a_constant_velocity_lands_where_it_should():
    def constant(**inputs):
        return (torch.full_like(inputs["hidden_states"], 2.0),)

    start = noise(2, seed=0)
    *_, last = denoise(constant, [0, 1], start, steps=7)
    assert torch.allclose(last.latents, start - 2.0, atol=1e-5)


def test_any_callable_with_flux_inputs_can_stand_in_for_the_transformer():
    calls = []

    def session(*, return_dict, **inputs):
        calls.append(list(inputs))
        return (inputs["hidden_states"],)

    sample(session, [0, 1, 2, 3, 4], seed=0, steps=2, dtype=torch.bfloat16, batch_size=4)
    assert calls == [INPUTS] * 4


def test_capture_covers_the_whole_schedule(transformer):
    recorded = capture(transformer, labels=(3, 1, 4), seeds=(0, 1), steps=5)
    assert len(recorded) == 10
    times = [call["timestep"].unique().tolist() for call in recorded]
    assert times == [[time] for time in schedule(5)[:-1]] * 2


def test_capture_keeps_the_graphs_order_types_and_shapes(transformer):
    (call,) = capture(transformer, labels=(3, 1, 4), seeds=(0,), steps=1)
    assert list(call) == INPUTS
    assert {name: str(tensor.dtype) for name, tensor in call.items()} == {
        name: "torch.float32" if name in {"img_ids", "txt_ids", "guidance"} else "torch.bfloat16" for name in INPUTS
    }
    assert [tuple(tensor.shape) for tensor in call.values()] == [
        (3, 16, 16),
        (3, 8, 64),
        (3, 64),
        (3,),
        (16, 3),
        (8, 3),
        (3,),
    ]


def test_captured_states_are_those_the_sampler_passes_through(transformer):
    recorded = capture(transformer, labels=(5,), seeds=(9,), steps=3)
    walked = list(denoise(transformer, [5], noise(1, seed=9), steps=3))
    assert torch.equal(recorded[2]["hidden_states"], walked[1].latents.bfloat16())


def test_a_captured_tensor_can_take_part_in_training(transformer):
    (call,) = capture(transformer, labels=(0,), seeds=(0,), steps=1)
    assert not any(tensor.is_inference() for tensor in call.values())


def test_a_model_compared_with_itself_loses_nothing(transformer):
    compared = compare(transformer, {"itself": transformer}, images_per_seed=20, steps=2)
    assert compared.estimate("itself", "recognised") == estimate(compared.reference["recognised"])
    assert compared.estimate("itself", "velocity_error").mean == 0
    assert compared.estimate("itself", "frechet").mean == pytest.approx(0, abs=1e-4)
    assert compared.estimate("itself", "psnr_db").mean == pytest.approx(120)
    assert compared.checkpoints["itself"]["psnr_db"].values.shape == (1, 20)


def test_a_rounded_model_loses_a_little(transformer, roughened):
    compared = compare(transformer, {"rough": roughened}, seeds=(0, 1), images_per_seed=10, steps=5)
    assert 30 < compared.estimate("rough", "psnr_db").mean < 60
    assert 0.001 < compared.estimate("rough", "velocity_error").mean < 0.1
    assert estimate(compared.reference["recognised"]).mean >= 0.9
    assert [time for time, _ in compared.by_time["rough"]] == schedule(5)[:-1]


def test_the_velocity_error_is_relative_to_the_references_own_trajectory(transformer):
    def louder(**inputs):
        return (transformer(**inputs)[0] * 1.25,)

    compared = compare(transformer, {"louder": louder}, images_per_seed=10, steps=2)
    assert compared.estimate("louder", "velocity_error").mean == pytest.approx(0.25)
    assert [one.mean for _, one in compared.by_time["louder"]] == pytest.approx([0.25, 0.25])


def test_psnr_of_a_constant_difference_is_its_decibels():
    assert psnr_db(torch.full((1, 4, 4), 0.6), torch.full((1, 4, 4), 0.5)).item() == pytest.approx(20, abs=1e-4)
    assert math.isfinite(psnr_db(torch.ones(1, 4, 4), torch.ones(1, 4, 4)).item())


@pytest.mark.parametrize(("seeds", "images"), [((), 10), ((0,), 0)])
def test_comparing_no_image_is_refused(transformer, seeds, images):
    with pytest.raises(ValueError, match="at least one of each"):
        compare(transformer, {"itself": transformer}, seeds=seeds, images_per_seed=images)


def test_the_grid_is_a_png_with_three_captioned_rows(transformer, roughened, tmp_path):
    path = tmp_path / "grid.png"
    grid(transformer, {"NVFP4": roughened}, path, labels=(0, 1, 2), steps=2)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (120 + 3 * 68, 28 + 3 * 68)
        # The caption column is not blank, and the digits' cells hold both black and white.
        assert picture.crop((0, 28, 120, 96)).getextrema()[0] < 128
        assert picture.crop((120, 28, 324, 96)).getextrema() == (0, 255)
    assert [file.name for file in tmp_path.iterdir()] == ["grid.png"]
