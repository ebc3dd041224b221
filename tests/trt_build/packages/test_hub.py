"""A folder for the hub: the checkpoint's own bytes, and a model card that the hub's own library reads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import fp4trt
from fp4trt.errors import BadOption, UnfitArtifact
from onnx_functions.inspection.inspect import describe
from trt_build.packages.model_card import Facts, absolute_paths, model_card

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAID = {
    "base_model": "black-forest-labs/FLUX.1-dev",
    "license": "other",
    "license_name": "flux-1-dev-non-commercial-license",
}


def manifest_of(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "fp4trt.json").read_text())
    return manifest


def test_a_checkpoint_becomes_a_folder_that_the_hub_reads(
    quantized_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["package", str(quantized_digits), "--for", "hub", "-o", str(tmp_path / "up")]
    for name, value in SAID.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    assert fp4trt.run([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    kept = ["config.json", WEIGHTS, "fp4trt.json", "model.onnx"]
    assert {file["name"] for file in said["files"]} == {*kept, "README.md"}
    assert {path.name for path in (tmp_path / "up").iterdir()} == {*kept, "README.md"}
    for name in kept:
        assert (tmp_path / "up" / name).read_bytes() == (quantized_digits / name).read_bytes()
    assert said["command"] == f"hf upload OWNER/NAME {tmp_path / 'up'} ."
    assert "left out, as no reader needs them: calibration/inputs.safetensors" in said["notes"]
    assert describe(tmp_path / "up")["kind"] == "quantized checkpoint"
    assert fp4trt.lint(tmp_path / "up")["passed"]

    card, manifest = ModelCard.load(tmp_path / "up" / "README.md"), manifest_of(quantized_digits)
    tags = ["fp4trt", "nvfp4", "modelopt", "tensorrt", "flux-digits"]
    told = {**SAID, "base_model_relation": "quantized", "library_name": "fp4trt", "tags": tags}
    assert card.data.to_dict() == told
    assert f"| NVFP4 | {len(manifest['quantized']['nvfp4'])} |" in card.text
    assert (
        f"| `{WEIGHTS}` | {(quantized_digits / WEIGHTS).stat().st_size:,} | {manifest['files'][WEIGHTS]} |" in card.text
    )
    assert f"calls 5, family flux-digits, inputs_sha256 {manifest['calibration']['inputs_sha256']}." in card.text
    assert all(f"{name} {version}" in card.text for name, version in manifest["versions"].items())
    assert json.loads(re.search(r"```json\n(.*?)```", card.text, re.DOTALL)[1]) == manifest["recipe"]
    assert f"| {manifest['sharing_cost']['weight_shared']:.4f} |" in card.text
    assert not re.search(r"(?<![\w./:])/\w", card.content)  # nothing begins with a slash
    assert str(tmp_path) not in card.content

    assert fp4trt.run([*arguments, "--force"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"up"}


def test_figures_formats_and_folders_of_any_manifest() -> None:
    manifest = {
        "family": "flux",
        "recipe": {"name": "mine", "method": {"name": "qat", "start": "/home/me/start.yaml"}},
        "quantized": {"nvfp4": ["a", "b"], "fp8": ["c"], "svdquant": ["a"]},
        "attention": {"fp8": ["x", "y"]},
        "calibration": {"data": "amax", "merged": [{"sha256": "12", "described": {}}, {"sha256": "34"}]},
        "blocks": {
            "0": {"a": {"error": 0.25, "changed": 0.5}, "b": {"error": 0.75}},
            "1": {"svdquant": {"a": {"residual": 1}}},
        },
        "files": {"config.json": "aa"},
        "source": {"C:\\models\\flux.safetensors": "bb"},
        "versions": {"torch": "2"},
    }
    text = model_card(manifest, Facts({"config.json": 3}))
    assert "| error of a linear's output on calibration data, relative to the output | 2 | 0.5000 | 0.7500 |" in text
    assert "beside" not in text
    assert "| what a low-rank branch leaves of a weight, relative to the weight | 1 | 1.0000 | 1.0000 |" in text
    for line in ("| NVFP4 | 2 |", "| FP8 | 1 |", "| of these with a low-rank branch in 16 bit | 1 |"):
        assert line in text.splitlines()
    assert "2 attentions are computed in FP8." in text
    assert "Calibrated on: amax, sha256 12, sha256 34." in text
    assert '"start": "start.yaml"' in text
    assert "| `flux.safetensors` | bb |" in text
    assert "fp4trt export model " in text
    assert list(absolute_paths(manifest["recipe"])) == ["/home/me/start.yaml"]
    assert ModelCard(text).data.license is None


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _flipped(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def _said(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "fp4trt.json").write_text(json.dumps(manifest_of(folder) | changes))


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, str], type[Exception], str]] = {
    "no manifest": (_without("fp4trt.json"), {}, UnfitArtifact, "has no fp4trt.json; expected a checkpoint that"),
    "a missing file": (_without("config.json"), {}, UnfitArtifact, "has no config.json, which fp4trt.json lists"),
    "a changed file": (
        _flipped,
        {},
        UnfitArtifact,
        f"{WEIGHTS} is not the file that fp4trt.json lists; quantize again",
    ),
    "a manifest of nothing": (_said(recipe={}), {}, UnfitArtifact, "is not as fp4trt writes it (KeyError('name'))"),
    "a base model's folder": (lambda _: 0, {"base_model": "/models/flux"}, BadOption, "base_model is '/models/flux'"),
    "a license in words": (lambda _: 0, {"license": "Apache 2"}, BadOption, "license is 'Apache 2'; expected an ident"),
    "a name of a known license": (
        lambda _: 0,
        {"license": "mit", "license_name": "mine"},
        BadOption,
        "license_name is 'mine', which is for the license 'other'",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_uploaded_is_refused(what: str, copy_of_digits: Path, tmp_path: Path) -> None:
    change, options, error, words = REFUSED[what]
    change(copy_of_digits)
    with pytest.raises(error) as refused:
        fp4trt.package(copy_of_digits, tmp_path / "up", program="hub", **options)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {copy_of_digits.name}


def test_a_graph_with_copies_of_the_weights_is_left_out(
    copy_of_digits: Path, copied_digits: Path, tmp_path: Path
) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(copied_digits / name, copy_of_digits)
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    copy_of_digits.rename(tmp_path / "pipe" / "transformer")
    packaged = fp4trt.package(tmp_path / "pipe", tmp_path / "up", program="hub")
    assert {path.name for path in (tmp_path / "up").iterdir()} == {"config.json", WEIGHTS, "fp4trt.json", "README.md"}
    assert "left out: model.onnx, whose weights are copies of the checkpoint's" in packaged.notes
    assert "the card does not say what --base-model and --license would tell" in packaged.notes
    assert {file["how"] for file in packaged.files} == {"copied", "written"}
