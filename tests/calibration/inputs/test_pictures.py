"""Pipelines that read pictures beside prompts: each is given what it reads, or says in one line what it lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fp4trt
from calibration.checkpoints.plain import load_source
from calibration.inputs.captured import load_inputs
from calibration.inputs.pictures import conditions_of
from calibration.inputs.prompts import Sampling
from fp4trt.errors import BadInputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from generation.comparison.drawing import follow
from generation.comparison.pipeline import pipeline_sampler

CHANNELS: dict[str, dict[str, int]] = {
    "FluxFillPipeline": {"in_channels": 132, "out_channels": 64},
    "FluxControlPipeline": {"in_channels": 128, "out_channels": 64},
}
Named = Callable[[str], Path]


@pytest.fixture(scope="module")
def named(
    pipeline: Path, tiny_flux: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a maker of pipelines of a class, around a transformer with the channels of that class."""

    def make(name: str, **changes: int) -> Path:
        folder = tmp_path_factory.mktemp(name) / "pipe"
        shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("transformer"))
        tiny_flux(folder / "transformer", **(changes or CHANNELS.get(name, {})))
        index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of two pictures, one with a mask in its alpha channel and one with a mask beside it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 24, 48, 4), np.uint8)
    noise[0, :, :24, 3], noise[0, :, 24:, 3] = 255, 0
    Image.fromarray(noise[0], "RGBA").save(folder / "a.png")
    Image.fromarray(noise[1, :, :, :3], "RGB").save(folder / "b.png")
    Image.fromarray(np.full((24, 48), 255, np.uint8), "L").save(folder / "b.mask.png")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    return tmp_path / "prompts.txt"


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"])
def test_what_a_pipeline_reads_of_pictures_reaches_its_transformer(
    name: str, named: Named, pictures: Path, prompts: Path, tmp_path: Path
) -> None:
    folder = named(name)
    given = ["--prompts", str(prompts), "--pictures", str(pictures), "--steps", "2", "--resolution", "32"]
    kept = tmp_path / "inputs.safetensors"
    assert (
        fp4trt.run(["calibrate", str(folder), "-o", str(tmp_path / "a.json"), *given, "--save-inputs", str(kept)]) == 0
    )
    calls = load_inputs(kept)
    assert len(calls) == 3 * 2
    first, second, third = (calls[index]["hidden_states"] for index in (0, 2, 4))
    # 32 x 32 pixels are 256 tokens here. Of Kontext's the second half are the picture's, of the others more channels.
    if name == "FluxKontextPipeline":
        tokens = first.shape[1] - 256
        assert abs(tokens - 256) < 32  # 44 x 22 pixels have the area of 32 x 32
        assert calls[0]["img_ids"][256:, 0].eq(1).all()
        read = [state[:, 256:] for state in (first, second, third)]
    else:
        assert first.shape[1:] == (256, CHANNELS[name]["in_channels"])
        read = [state[:, :, 64:] for state in (first, second, third)]
    assert not torch.equal(read[0], read[1])
    if name == "FluxFillPipeline":  # what the VAE's noise leaves alone: 1 where to fill, in the order of the pictures
        masks = [state[0, :, 64:].float() for state in read]
        assert (masks[0].mean().item(), masks[1].mean().item(), masks[2].mean().item()) == (0.5, 1.0, 0.5)


def test_a_comparison_reads_the_pictures_too(named: Named, pictures: Path) -> None:
    folder = named("FluxControlPipeline") / "transformer"
    family, sampling = family_of(load_json(folder / "config.json")), Sampling(1, 32, pictures)
    sampler = pipeline_sampler(folder, family, ["a cat"], 2, sampling)
    assert list(sampler.described["pictures"]) == ["a.png", "b.png"]
    one, other = sampler.draw(load_source(folder), 0)
    assert one.velocities[0].shape == (1, 256, 64)
    assert one.calls[0]["hidden_states"].shape == (1, 256, 128)
    assert not torch.equal(one.calls[0]["hidden_states"][..., 64:], other.calls[0]["hidden_states"][..., 64:])


def test_a_comparison_leaves_out_what_kontext_answers_to_the_picture_it_edits(named: Named, pictures: Path) -> None:
    folder = named("FluxKontextPipeline") / "transformer"
    family = family_of(load_json(folder / "config.json"))
    sampler = pipeline_sampler(folder, family, ["a cat"], 1, Sampling(1, 32, pictures))
    model = load_source(folder)
    (batch,) = sampler.draw(model, 0)
    assert batch.calls[0]["hidden_states"].shape[1] > 256
    assert batch.velocities[0].shape == (1, 256, 64)
    assert follow(sampler, model, 0, [batch]).squared_error.eq(0).all()


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline"])
@pytest.mark.parametrize("command", ["calibrate", "compare"])
def test_without_pictures_the_pipeline_and_the_option_are_named(
    command: str, name: str, named: Named, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["a=nowhere"] if command == "compare" else []
    asked = [command, str(named(name)), *more, "-o", str(tmp_path / "out"), "--prompts", str(prompts)]
    assert fp4trt.run(asked) == 2
    printed = capsys.readouterr().err.strip()
    assert f"is a {name}, which reads pictures beside prompts; give --pictures FOLDER|FILE" in printed
    assert "\n" not in printed


def test_a_pipeline_that_does_not_draw_is_told_in_one_line(
    pipeline: Path, tiny_flux: Callable[..., Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(pipeline, tmp_path / "pipe", ignore=shutil.ignore_patterns("transformer"))
    tiny_flux(tmp_path / "pipe" / "transformer", joint_attention_dim=48)  # its text encoder gives 32
    asked = ["calibrate", str(tmp_path / "pipe"), "-o", str(tmp_path / "a.json"), "--prompts", str(prompts)]
    assert fp4trt.run([*asked, "--steps", "1", "--resolution", "32"]) == 2
    assert "pipe does not draw (mat1 and mat2 shapes cannot be multiplied" in capsys.readouterr().err


def test_a_pipeline_that_cannot_be_sampled_is_named(named: Named, pictures: Path) -> None:
    def refusal(folder: Path, given: Path | None) -> str:
        with pytest.raises(BadInputs) as refused:
            conditions_of(folder, load_json(folder / "transformer" / "config.json"), given)
        return str(refused.value)

    unknown = named("FluxControlNetPipeline")
    assert "is a FluxControlNetPipeline; prompts are sampled with one of: FluxPipeline, " in refusal(unknown, None)
    assert "is a FluxPipeline, which reads no pictures" in refusal(named("FluxPipeline"), pictures)
    fill = named("FluxPipeline", in_channels=384, out_channels=64)
    assert "which takes 64 with its VAE, but its transformer has 384 channels in and 64 out" in refusal(fill, None)
    folder = named("FluxFillPipeline")
    (pictures / "b.mask.png").unlink()
    assert "b.png has no mask; expected b.mask.png beside it" in refusal(folder, pictures)
    (pictures / "a.png").write_text("no picture")
    assert "a.png is not a picture that can be read" in refusal(folder, pictures)
    for content, kind in (
        (b"", "is empty: copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the file that it stands for"),
        (b"<!DOCTYPE html><title>", "is a web page, not the file"),
    ):
        (pictures / "a.png").write_bytes(content)
        assert f"a.png {kind}" in refusal(folder, pictures)
    assert "nowhere does not exist; expected a picture" in refusal(folder, pictures / "nowhere")
