"""What is the user's stays: results replace only what fp4trt itself has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.by_block.calibration import calibrate
from calibration.quantization import quantize
from fp4trt import publish
from fp4trt.errors import BadAmax, BadCheckpoint, BadInputs, OutputExists
from fp4trt.families import family_of
from fp4trt.json_file import load_json


def _files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_folder_of_the_users_named_partial_is_in_the_way_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with (
        pytest.raises(OutputExists, match=r"out\.partial is in the way"),
        publish.replacing(tmp_path / "out", force=True),
    ):
        pytest.fail("nothing may be written")
    assert _files(tmp_path) == {"out.partial/thesis.txt": b"mine"}


def test_a_partial_folder_of_ours_that_a_kill_left_is_taken_over(tmp_path: Path) -> None:
    with publish.replacing(tmp_path / "out", force=False) as partial:
        (partial / "half").write_text("half")
        left = {name: content for name, content in _files(partial).items() if name != "half"}
    (tmp_path / "other.partial").mkdir()
    for name, content in left.items():
        (tmp_path / "other.partial" / name).write_bytes(content)
    (tmp_path / "other.partial" / "half").write_text("half")
    with publish.replacing(tmp_path / "other", force=False) as partial:
        (partial / "whole").write_text("whole")
    assert _files(tmp_path) == {"out/half": b"half", "other/whole": b"whole"}


def test_a_folder_of_the_users_named_old_stays(copy_of_digits: Path) -> None:
    old = copy_of_digits.with_name("digits-fp4.old")
    old.mkdir()
    (old / "thesis.txt").write_text("mine")
    with publish.replacing(copy_of_digits, force=True) as partial:
        (partial / "new").write_text("new")
    assert _files(copy_of_digits.parent) == {"digits-fp4/new": b"new", "digits-fp4.old/thesis.txt": b"mine"}


@pytest.mark.parametrize(
    "name",
    [
        "my.onnx",
        "mine.engine",
        "mine.json",
        "validation/mine.txt",
        "calibration/thesis.txt",
        "x.onnx/y",
        "b200.build.py",
    ],
)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_file_of_the_users_anywhere_in_a_result_keeps_it(
    name: str, with_manifest: bool, copy_of_digits: Path
) -> None:
    if not with_manifest:
        (copy_of_digits / "fp4trt.json").unlink()
    path = copy_of_digits / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(OutputExists, match="which fp4trt did not write"):
        publish.refuse_foreign(copy_of_digits, force=True)


def test_what_every_stage_writes_into_a_result_may_be_replaced(copy_of_digits: Path) -> None:
    (copy_of_digits / "validation").mkdir()
    (copy_of_digits / "validation" / "report.json").write_text("{}")
    (copy_of_digits / "rtx5090.engine").write_bytes(b"engine")
    (copy_of_digits / "rtx5090.json").write_text('{"engine_sha256": "0"}')
    (copy_of_digits / "b200.build.py").write_text("# Written by fp4trt: run it on the machine with the GPU\n")
    publish.refuse_foreign(copy_of_digits, force=True)


def test_an_empty_folder_is_replaced_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    publish.refuse_foreign(tmp_path / "out", force=True)
    with pytest.raises(OutputExists, match="--force"):
        publish.refuse_foreign(tmp_path / "out", force=False)


def test_one_file_cannot_be_two_results_nor_a_result_and_the_input(
    digits: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputExists, match="named twice"):
        calibrate(digits, tmp_path / "same", save_inputs_to=tmp_path / "same")
    inputs = tmp_path / "inputs.safetensors"
    inputs.write_bytes((quantized_digits / "calibration" / "inputs.safetensors").read_bytes())
    with pytest.raises(OutputExists, match="named twice"):
        calibrate(digits, inputs, inputs=inputs, force=True)


def test_calibrate_makes_the_folder_of_its_result_and_refuses_a_folder_in_its_place(
    digits: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    inputs = quantized_digits / "calibration" / "inputs.safetensors"
    calibrate(digits, tmp_path / "a" / "b" / "amax.json", inputs=inputs)
    with pytest.raises(OutputExists, match="is a folder"):
        calibrate(digits, tmp_path / "a", inputs=inputs, force=True)
    assert list(_files(tmp_path)) == ["a/b/amax.json"]


@pytest.mark.parametrize("value", [1e-300, 1e300, 1e-43])
def test_a_maximum_that_fp32_cannot_hold_as_a_scale_is_refused(value: float, digits: Path, tmp_path: Path) -> None:
    paths = family_of(load_json(digits / "config.json")).quantized(load_json(digits / "config.json"))
    (tmp_path / "amax.json").write_text(json.dumps({**dict.fromkeys(paths, 1.0), paths[7]: value}))
    with pytest.raises(BadAmax, match=paths[7].replace(".", r"\.")):
        quantize(digits, tmp_path / "out", calibration=tmp_path / "amax.json")


def test_maxima_of_another_model_and_two_sources_of_maxima_are_refused(digits: Path, tmp_path: Path) -> None:
    paths = family_of(load_json(digits / "config.json")).quantized(load_json(digits / "config.json"))
    (tmp_path / "amax.json").write_text(json.dumps({**dict.fromkeys(paths, 1.0), "foo.bar": 1.0}))
    with pytest.raises(BadAmax, match=r"foo\.bar"):
        quantize(digits, tmp_path / "out", calibration=tmp_path / "amax.json")
    with pytest.raises(BadInputs, match="expected one of them"):
        quantize(digits, tmp_path / "out", calibration=tmp_path / "amax.json", modelopt_state=tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_layers": "x"}, "num_layers is 'x'"),
        ({"num_layers": None}, "num_layers is None"),
        ({"num_single_layers": 0}, "num_single_layers is 0"),
        ({"axes_dims_rope": [16, 23, 25]}, "expected even numbers"),
        ({"axes_dims_rope": [16, 24, 22]}, "adds up to 62"),
        ({"attention_head_dim": True}, "attention_head_dim is True"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(change: dict[str, object], words: str, digits: Path) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        family_of({**load_json(digits / "config.json"), **change})


@pytest.mark.parametrize(
    "manifest", ['{"files": []}', '{"quantized": []}', '{"quantized": {"nvfp4": [1]}}', '{"recipe": "x"}', "[]", "{"]
)
def test_a_damaged_manifest_is_refused(manifest: str, copy_of_digits: Path) -> None:
    from calibration.checkpoints.quantized import read

    (copy_of_digits / "fp4trt.json").write_text(manifest)
    with pytest.raises(BadCheckpoint, match=r"fp4trt\.json"):
        read(copy_of_digits)


@pytest.mark.parametrize("index", ['{"weight_map": [1]}', '{"weight_map": {}}', "{}", '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(index: str, copy_of_digits: Path) -> None:
    from fp4trt.checkpoint_folder import tensors_in_folder

    (copy_of_digits / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(BadCheckpoint, match="weight_map"):
        tensors_in_folder(copy_of_digits)
