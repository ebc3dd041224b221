"""Amax values belong to the model that they were measured on, and tell which that was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.by_block.calibration import METADATA, SOURCE, calibrate, calibration_from
from calibration.checkpoints.plain import weights_fingerprint
from calibration.inputs.captured import save_inputs
from fp4trt.errors import BadAmax
from fp4trt.families import family_of
from fp4trt.json_file import load_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def flux(tiny_flux: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_flux(tmp_path / "flux")


def other_weights(flux: Path, folder: Path) -> Path:
    """Write a model of the same names and shapes, one of whose tensors differs, as a fine-tuned one's all do."""
    folder.mkdir()
    (folder / "config.json").write_bytes((flux / "config.json").read_bytes())
    tensors = load_file(flux / WEIGHTS)
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + 1
    save_file(tensors, folder / WEIGHTS)
    return folder


def test_maxima_of_another_model_with_the_same_names_are_refused(
    flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_json(flux / "config.json")
    family = family_of(config)
    save_inputs(tmp_path / "inputs.safetensors", [family.example_inputs(config, (1, 4, 3), 0, torch.bfloat16)])
    calibrate(flux, tmp_path / "amax.json", inputs=tmp_path / "inputs.safetensors")
    stored = json.loads((tmp_path / "amax.json").read_text())
    assert stored[METADATA][SOURCE] == weights_fingerprint(flux)
    capsys.readouterr()
    with calibration_from(flux, tmp_path / "amax.json", tmp_path / "work") as calibrated:
        assert calibrated.amax == {path: value for path, value in stored.items() if path != METADATA}
    assert capsys.readouterr().err == ""
    other = other_weights(flux, tmp_path / "other")
    with (
        pytest.raises(
            BadAmax, match=r"amax\.json was measured on another model \(weights [0-9a-f]{12}, this one's are"
        ),
        calibration_from(other, tmp_path / "amax.json", tmp_path / "work"),
    ):
        pass
    del stored[METADATA]
    (tmp_path / "plain.json").write_text(json.dumps(stored))
    with calibration_from(other, tmp_path / "plain.json", tmp_path / "work"):
        pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path / 'plain.json'} does not say on which model it was measured")


def test_a_copy_in_fp32_or_in_shards_is_the_same_model(flux: Path, tmp_path: Path) -> None:
    tensors = load_file(flux / WEIGHTS)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((flux / "config.json").read_bytes())
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name].float() for name in held}, copy / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (copy / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert weights_fingerprint(copy) == weights_fingerprint(flux)
