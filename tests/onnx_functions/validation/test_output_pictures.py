"""Outputs are drawn where their numbers lie on a grid, and at several times in one batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from fp4trt.families import family_named
from onnx_functions.validation.error_by_time import TIMES, batch_of_times, errors_by_time
from onnx_functions.validation.output_pictures import pictures_of
from onnx_functions.validation.structure_gates import Run, output_key
from onnx_functions.validation.verdict import FloatArray, OutputPicture

FLUX = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": True}


def drawn(
    family: str, config: Mapping[str, object], reference: list[FloatArray], graph: list[FloatArray], tokens: int
) -> list[OutputPicture]:
    """Return the pictures of two runs whose positions are those of the family's example inputs."""
    held = family_named(family)
    inputs = held.positions(held.sizes(1, tokens, 4))
    values = {output_key("", place): value for place, value in enumerate(reference)}
    return pictures_of(held, config, Run("run", inputs, values), graph)


def test_a_token_is_a_square_at_its_place_and_the_difference_is_on_the_same_scale() -> None:
    reference = np.zeros((1, 6, 4), np.float32)  # three rows of two
    reference[0, 3] = [1, -1, 0.5, 0]  # second row, second column
    graph = reference.copy()
    graph[0, 3, 3], graph[0, 0, 0] = np.nan, 0.5
    (found,) = drawn("flux", FLUX, [reference], [graph], 6)
    assert found.reference.shape == (6, 4)
    assert found.reference[2:4, 2:4].tolist() == [[255, 0], [191, 128]]
    assert (found.reference[:2] == 128).all()
    assert found.graph[3, 3] == found.difference[3, 3] == 255
    assert found.difference[0, 0] == round(0.25**0.5 * 255)
    assert np.count_nonzero(found.difference) == 2
    assert found.note == "relative L2 error inf"


def test_axes_of_a_position_that_count_nothing_do_not_matter() -> None:
    values = np.ones((1, 6, 4), np.float32)
    (found,) = drawn("flux2", FLUX, [values], [values], 6)  # (time, row, column, layer)
    assert found.reference.shape == (6, 4)
    assert drawn("flux2", FLUX, [values[:, :5]], [values[:, :5]], 5) == []  # a line is no picture


def test_of_a_video_it_is_the_first_frame_and_sound_is_no_picture() -> None:
    config = {"in_channels": 4, "audio_in_channels": 4, "caption_channels": 8, "cross_attn_mod": False}
    random = np.random.default_rng(0)
    video, audio = (random.standard_normal((1, tokens, 4)).astype(np.float32) for tokens in (8, 8))
    found = drawn("ltx2", config, [video, audio], [video, audio], 8)
    assert [picture.caption for picture in found] == ["video, run"]
    assert found[0].reference.size == 4 * 4
    assert found[0].reference[0, 0] == round((0.5 + video[0, 0, 0] / (2 * np.abs(video[0, :4]).max())) * 255)
    assert not found[0].difference.any()


def test_many_tokens_show_some_of_their_channels_and_say_so() -> None:
    values = np.ones((1, 128 * 128, 64), np.float32)
    (found,) = drawn("flux", {**FLUX, "in_channels": 64}, [values], [values], 128 * 128)
    assert found.reference.shape == (256, 256)
    assert found.note == "4 of 64 channels, relative L2 error 0"


@pytest.mark.parametrize(("shape", "pixels"), [((2, 3, 4, 5), (4, 5, 3)), ((1, 16, 2, 4, 4), (16, 16)), ((4, 9), None)])
def test_pictures_and_videos_are_drawn_as_they_are(shape: tuple[int, ...], pixels: tuple[int, ...] | None) -> None:
    values = np.ones(shape, np.float32)
    found = drawn("flux", FLUX, [values], [values], 6)
    assert [picture.reference.shape for picture in found] == ([] if pixels is None else [pixels])
    assert drawn("flux", FLUX, [values], [values[..., :-1]], 6) == []


def test_the_batch_of_times_differs_in_the_time_alone() -> None:
    family = family_named("wan")
    config = {"in_channels": 4, "text_dim": 8, "patch_size": [1, 2, 2]}
    call = family.example_inputs(config, (1, 4, 3), 0, torch.bfloat16)
    many = batch_of_times(family, config, call)
    assert many is not None
    assert many["timestep"].tolist() == [1000 * time for time in TIMES]
    for name in call.keys() - {"timestep"}:
        assert all(torch.equal(one, call[name][0]) for one in many[name]) or torch.equal(many[name], call[name])


def test_each_time_is_compared_with_its_own() -> None:
    family = family_named("flux")
    reference = np.ones((len(TIMES), 4, 4), np.float32)
    graph = reference * (1 + np.arange(len(TIMES), dtype=np.float32) / 100)[:, None, None]
    inputs = family.positions(family.sizes(1, 4, 3))

    class Session:
        def run(self, names: None, feeds: object) -> list[FloatArray]:
            return [graph]

    run = Run("several times", inputs, {output_key("", 0): reference})
    by_time, pictures = errors_by_time(family, FLUX, Session, [run])  # type: ignore[arg-type]
    assert [time for time, _ in by_time.points] == list(TIMES)
    assert [errors["latent"] for _, errors in by_time.points] == pytest.approx(
        [0.01 * n for n in range(len(TIMES))], 1e-4
    )
    assert [picture.caption for picture in pictures][:2] == ["time 1", "time 0.875"]


def test_a_model_without_a_time_says_so() -> None:
    by_time, pictures = errors_by_time(family_named("flux"), FLUX, pytest.fail, [])
    assert (by_time.points, pictures) == ((), [])
    assert by_time.left_out == "no input of the model is a time for each picture of a batch"
