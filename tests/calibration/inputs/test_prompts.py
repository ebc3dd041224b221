"""From prompts to captured inputs: the built-in model's words, and a real (tiny) FLUX pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calibration.by_block.calibration import METADATA, calibrate
from calibration.formats.attention_amax import operands_of
from calibration.inputs.captured import load_inputs
from calibration.inputs.prompts import read_prompts
from fp4trt.errors import BadInputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json


def test_a_pipelines_prompts_are_sampled_over_the_whole_schedule(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    result = calibrate(
        pipeline,
        tmp_path / "amax.json",
        prompts=tmp_path / "prompts.txt",
        save_inputs_to=tmp_path / "inputs.safetensors",
        steps=3,
        resolution=32,
    )
    assert result["calls"] == 2 * 3
    amax = json.loads((tmp_path / "amax.json").read_text())
    config = load_json(pipeline / "transformer" / "config.json")
    family = family_of(config)
    assert list(amax) == sorted([METADATA, *family.quantized(config), *operands_of(family.attentions(config))])
    calls = load_inputs(tmp_path / "inputs.safetensors")
    times = [float(call["timestep"][0]) for call in calls[:3]]
    assert times[0] == 1.0
    assert times == sorted(times, reverse=True)
    assert not torch.equal(calls[0]["hidden_states"], calls[3]["hidden_states"])
    again = calibrate(pipeline, tmp_path / "again.json", inputs=tmp_path / "inputs.safetensors")
    assert again["linears"] == 20
    repeated = json.loads((tmp_path / "again.json").read_text())
    assert {**repeated, METADATA: 0} == {**amax, METADATA: 0}


def test_words_choose_what_the_built_in_model_draws(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("three\nseven\n")
    result = calibrate("digits", tmp_path / "amax.json", prompts=tmp_path / "words.txt")
    assert result["linears"] == 52
    (tmp_path / "words.txt").write_text("eleven\n")
    with pytest.raises(BadInputs, match="'eleven' is not a word of this model's prompts; it knows: zero"):
        calibrate("digits", tmp_path / "other.json", prompts=tmp_path / "words.txt")


def test_a_transformer_alone_cannot_sample_prompts(tiny_flux: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    with pytest.raises(BadInputs, match="flux is not in a pipeline"):
        calibrate(tiny_flux(tmp_path / "flux"), tmp_path / "amax.json", prompts=tmp_path / "prompts.txt")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"\xff\xfe", "UTF-8"),
        (b"\x1f\x8b\xff", "is compressed by gzip: unpack it"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:a\n", "is a Git LFS pointer"),
    ],
)
def test_a_file_without_prompts_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(BadInputs, match=words):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(BadInputs, match="does not exist"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(BadInputs, match="is a folder; expected a text file, one prompt a line"):
        read_prompts(tmp_path)
