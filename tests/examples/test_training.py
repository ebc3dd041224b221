"""The training scripts: killed and started again they give the same bytes, and what they write goes the whole way."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import fp4trt
from fp4trt.errors import BadCheckpoint, BadInputs
from fp4trt.families.flux import FLUX
from tests import warm_python

EXAMPLES = Path(fp4trt.__file__).parents[1] / "examples"
TRAIN = """
import sys
from pathlib import Path
from tests.examples import test_training
print(getattr(test_training, sys.argv[1])(Path(sys.argv[2])))
"""


def script(name: str) -> Any:
    """Return a training script as a module."""
    spec = importlib.util.spec_from_file_location(f"train_{name}", EXAMPLES / name / "train.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_emoji() -> Any:
    """Return the emoji script with a model of one head, and of one block of each kind."""
    module = script("emoji")
    module.CONFIG |= {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    return module


def digest(model: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(p.view(torch.int16).numpy().tobytes() for p in model.parameters())).hexdigest()


def emoji(folder: Path) -> str:
    module = small_emoji()
    learned = module.load_emoji(module.find_font(None), 8)
    with module.publishing(folder, force=False) as partial:
        plan = module.Plan(8, keep_every=1)
        return digest(module.train_transformer(learned, module.describe(learned.names), plan, partial))


def flux2_digits(folder: Path) -> str:
    module = script("digits")
    module.CONFIGS["flux2"] |= {"num_layers": 1, "num_single_layers": 1}
    with module.publishing(folder, force=False) as partial:
        plan = module.Plan(8, 0, 2e-3, lean=False, keep_every=1)
        return digest(module.train_transformer(module.load_images(), module.FLUX2, plan, 1, partial))


@pytest.fixture
def font() -> Path:
    try:
        return script("emoji").find_font(None)
    except click.UsageError as error:
        pytest.skip(error.message)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.parametrize("model", ["emoji", "flux2_digits"])
def test_a_killed_training_resumes_to_the_same_bytes(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("sklearn") if model == "flux2_digits" else request.getfixturevalue("font")
    status, whole = warm_python.run(TRAIN, model, tmp_path / "whole")
    assert status == 0, whole
    with warm_python.started(TRAIN, model, tmp_path / "killed") as running:
        assert running.wait((tmp_path / "killed.partial" / "training.pt").exists), running.printed
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert not (tmp_path / "killed").exists()
    status, resumed = warm_python.run(TRAIN, model, tmp_path / "killed")
    assert status == 0, resumed
    assert "resuming after step" in resumed
    assert resumed.split()[-1] == whole.split()[-1]


@pytest.mark.slow
def test_what_the_emoji_script_writes_is_quantized_and_compared(
    font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small_emoji()
    monkeypatch.setattr(module, "CLASSIFIER_STEPS", 2)
    monkeypatch.setattr(module, "EVALUATION_IMAGES", 4)
    monkeypatch.setattr(module, "CALIBRATION_IMAGES", 2)
    plain, quantized = tmp_path / "emoji", tmp_path / "emoji-fp4"
    plain.mkdir()
    module.write_model(plain, module.load_emoji(font, 8), module.Plan(3))
    fp4trt.quantize(plain, quantized, recipe="nvfp4-ptq", calibration=plain / "calibration" / "inputs.safetensors")
    fp4trt.quantize(plain, tmp_path / "again", recipe="nvfp4-ptq")
    weights = "diffusion_pytorch_model.safetensors"
    assert (quantized / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
    found = fp4trt.compare(plain, {"ptq": quantized}, tmp_path / "compared", images=4, steps=2, seeds=[1000])
    assert found["family"] == "flux"
    assert found["prompts"][0].split()[-2] == "on"
    assert {"psnr_db", "velocity_error", "frechet", "recognised"} <= set(found["metrics"])
    (tmp_path / "prompts.txt").write_text("cathedral on blue\n")
    with pytest.raises(BadInputs, match="'cathedral' is not a word of this model's prompts"):
        fp4trt.compare(plain, {"ptq": quantized}, tmp_path / "other", prompts=tmp_path / "prompts.txt")
    with pytest.raises(BadInputs, match="this model draws 32 x 32 pixels"):
        fp4trt.compare(plain, {"ptq": quantized}, tmp_path / "other", resolution=64)


def test_a_missing_font_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("emoji")
    monkeypatch.setattr(module, "FONT_PLACES", ())
    with pytest.raises(click.UsageError, match="install fonts-noto-color-emoji, or give --font FILE"):
        module.find_font(None)
    with pytest.raises(click.UsageError, match=r"no\.ttf is no file"):
        module.find_font(tmp_path / "no.ttf")
    (tmp_path / "other.ttf").write_bytes(b"no font")
    with pytest.raises(click.UsageError, match=r"expected NotoColorEmoji\.ttf"):
        module.load_emoji(tmp_path / "other.ttf", 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "sampling.json: steps: Input should be greater than or equal to 1"),
        ({"image": {"size": 32, "channels": 1}}, "whose in_channels is 16, config.json has 48"),
        ({"format": "fp4trt sampling 2"}, "sampling.json: format: Input should be 'fp4trt sampling 1'"),
    ],
)
def test_a_damaged_description_is_told_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    from calibration.inputs.pixel_space import describe
    from calibration.pixel_space.description import write_description

    described = script("emoji").describe(tuple("abcdefgh"))
    (tmp_path / "config.json").write_text(json.dumps({"in_channels": 48, "joint_attention_dim": 64}))
    write_description(tmp_path, described)
    assert describe(tmp_path, FLUX) == described
    held = json.loads((tmp_path / "sampling.json").read_text())
    (tmp_path / "sampling.json").write_text(json.dumps(held | change))
    with pytest.raises(BadCheckpoint, match=said):
        describe(tmp_path, FLUX)
