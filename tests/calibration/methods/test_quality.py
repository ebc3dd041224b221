"""The method ``quality``: better than plain rounding, as it says itself, and the same bytes after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import fp4trt
from calibration.checkpoints.quantized import WEIGHTS, load, read
from calibration.digits.model import load_transformer
from calibration.digits.sampling import capture
from calibration.inputs.captured import load_inputs, save_inputs
from calibration.quantization import quantize
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import sha256_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def digits(built_in: Path) -> Path:
    """The whole built-in model: errors are those of the model that draws."""
    return built_in


@pytest.fixture(scope="module")
def quantized_digits(quantized_built_in: Path) -> Path:
    return quantized_built_in


@pytest.fixture(scope="module")
def inputs(five_calls: Path) -> Path:
    return five_calls


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that takes one run for each block."""
    path = tmp_path_factory.mktemp("recipe") / "quick.yaml"
    method = {"name": "quality", "sequential": False, "descent_sweeps": 1}
    path.write_text(yaml.safe_dump({"name": "quick", "method": method}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def result(digits: Path, inputs: Path, quick: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quality") / "fp4"
    quantize(digits, directory, recipe=quick, calibration=inputs)
    return directory


def _velocity_error(model: torch.nn.Module) -> float:
    reference, wrong, power = load_transformer(), 0.0, 0.0
    calls = capture(reference, seeds=(1,), steps=5)  # not calibrated on
    with torch.inference_mode():
        for call in calls:
            given = {name: value.float() for name, value in call.items()}
            wanted = reference(**given, return_dict=False)[0]
            wrong += float((model(**given, return_dict=False)[0] - wanted).square().sum())
            power += float(wanted.square().sum())
    return (wrong / power) ** 0.5


def test_the_model_is_better_than_after_plain_rounding_on_data_that_calibration_has_not_seen(
    result: Path, quantized_digits: Path
) -> None:
    plain, ours = (_velocity_error(load(path, dtype=torch.float32)) for path in (quantized_digits, result))
    assert ours < 0.9 * plain


def test_the_modulation_in_fp8_is_as_good(
    digits: Path, result: Path, inputs: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    method = {"name": "quality", "sequential": False, "descent_sweeps": 1}
    rules = {"rules": [{"linears": "*.norm*.linear", "format": "fp8"}]}
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mixed", "method": method, "formats": rules}), encoding="utf-8")
    quantize(digits, tmp_path / "mixed", recipe=recipe, calibration=inputs)
    mixed = read(tmp_path / "mixed")
    assert (len(mixed.quantized), len(mixed.fp8)) == (44, 8)
    for path in mixed.fp8:  # the largest magnitude is the largest code's
        assert float(mixed.tensor(f"{path}.weight").float().abs().max()) == 448
    ours, in_fp4 = (_velocity_error(load(path, dtype=torch.float32)) for path in (mixed.directory, result))
    assert ours < 1.01 * in_fp4


def test_a_branch_of_a_low_rank_makes_it_better_and_is_shared_by_a_group(
    digits: Path, result: Path, inputs: Path, tmp_path: Path
) -> None:
    method = {"name": "quality", "sequential": False, "descent_sweeps": 1, "rank": 2, "rank_multiple": 4}
    recipe = tmp_path / "branches.yaml"
    recipe.write_text(yaml.safe_dump({"name": "branches", "method": method}), encoding="utf-8")
    quantize(digits, tmp_path / "branches", recipe=recipe, calibration=inputs)
    checkpoint = read(tmp_path / "branches")
    for group in checkpoint.groups:
        assert {checkpoint.rank(path) for path in group} == {4 if len(group) < 3 else 8}
        assert len({checkpoint.tensors[f"{path}.svdquant_lora_a"].bytes().tobytes() for path in group}) == 1
    assert not any(checkpoint.is_smoothed(path) for path in checkpoint.quantized)
    figures = [entry for block in checkpoint.manifest["blocks"].values() for entry in block.values()]
    assert all(0 < entry["residual"] < 1 for entry in figures if "error" in entry)
    ours, without = (_velocity_error(load(path, dtype=torch.float32)) for path in (checkpoint.directory, result))
    assert ours < 0.85 * without


def test_every_linear_says_by_how_much_its_output_is_better(result: Path) -> None:
    manifest = load_json(result / MANIFEST)
    figures = [entry for block in manifest["blocks"].values() for entry in block.values() if "error" in entry]
    assert len(figures) == len(manifest["quantized"]["nvfp4"])
    for entry in figures:
        assert entry["changed"] > 0.01
        assert entry["error"] < entry["plain_error"]


def test_from_one_picture_a_modulation_whose_input_is_one_row_is_rounded_no_worse_than_plainly(
    digits: Path, inputs: Path, quick: Path, tmp_path: Path
) -> None:
    call = load_inputs(inputs)[0]
    one = {name: value if name.endswith("_ids") else value[:1].clone() for name, value in call.items()}
    save_inputs(tmp_path / "one.safetensors", [one])
    quantize(digits, tmp_path / "fp4", recipe=quick, calibration=tmp_path / "one.safetensors")
    blocks = read(tmp_path / "fp4").manifest["blocks"]
    figures = {path: entry for block in blocks.values() for path, entry in block.items() if "error" in entry}
    modulations = [entry for path, entry in figures.items() if "norm" in path]
    assert modulations
    assert all(0 < entry["error"] <= entry["plain_error"] for entry in modulations)


def test_scales_are_shared_in_a_group_and_those_of_the_manifest(result: Path) -> None:
    checkpoint = read(result)
    for group in checkpoint.groups:
        for leaf in ("weight_scale_2", "input_scale"):
            assert len({float(checkpoint.raw(f"{path}.{leaf}")) for path in group}) == 1
    amax = checkpoint.manifest["amax"]
    for path in checkpoint.quantized:
        for quantizer, leaf in (("weight_quantizer", "weight_scale_2"), ("input_quantizer", "input_scale")):
            assert amax[f"{path}.{quantizer}"] / 2688 == pytest.approx(
                float(checkpoint.raw(f"{path}.{leaf}")), rel=1e-6
            )


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    digits: Path, result: Path, inputs: Path, quick: Path, tmp_path: Path, kill_after: Callable[..., None]
) -> None:
    command = ["quantize", str(digits), "-o", tmp_path / "fp4", "--recipe", quick, "--calibration", inputs]
    kill_after(3, *command)
    kept = tmp_path / "fp4.calibration.partial"
    assert sorted(path.name for path in kept.iterdir()) == ["003.outputs", "blocks.json"]
    assert fp4trt.run([str(argument) for argument in command]) == 0
    for name in (WEIGHTS, MANIFEST, "config.json"):
        assert sha256_of(tmp_path / "fp4" / name) == sha256_of(result / name), name
    assert not kept.exists()


def test_maxima_alone_are_refused_in_one_line(
    digits: Path, quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(digits), "-o", tmp_path / "fp4", "--recipe", quick, "--calibration", "amax.json"]
    assert fp4trt.run([str(argument) for argument in command]) == 2
    message = capsys.readouterr().err
    assert "needs captured inputs" in message
    assert message.count("\n") == 1
