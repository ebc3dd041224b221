"""Bad input, through the command: one clear line on stderr, exit status 2, nothing left behind, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fp4trt
from calibration.inputs.captured import save_inputs
from fp4trt.families import family_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
MakeFlux = Callable[..., Path]
Commands = dict[str, list[object]]


def _refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must refuse, and return its one line."""
    status = fp4trt.run([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert out == ""
    return lines[0]


def _contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def source(tiny_flux: MakeFlux, tmp_path: Path) -> Path:
    return tiny_flux(tmp_path / "flux")


def _nan(source: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / WEIGHTS)
    tensors["transformer_blocks.0.ff.net.2.weight"][3, 5] = float("nan")
    save_file(tensors, source / WEIGHTS)


def _other_width(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "joint_attention_dim": 48}))


def _no_size(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_layers": 2.5}))


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weights": (lambda source: (source / WEIGHTS).unlink(), "does not exist"),
    "truncated weights": (lambda s: (s / WEIGHTS).write_bytes((s / WEIGHTS).read_bytes()[:-9]), "ends at byte"),
    "NaN weights": (_nan, "transformer_blocks.0.ff.net.2.weight holds NaN"),
    "other config": (_other_width, "context_embedder.weight is [32, 32]"),
    "missing config": (lambda source: (source / "config.json").unlink(), "has no config.json"),
    "config that is a folder": (lambda source: _folder(source / "config.json"), "config.json is a folder; expected"),
    "config without a config": (
        lambda source: (source / "config.json").write_text("null"),
        "config.json holds null",
    ),
    "config of no model": (_no_size, "flux/config.json: num_layers is 2.5, expected a whole number"),
    "binary config": (lambda source: (source / "config.json").write_bytes(b"\xff\x00"), "is not JSON"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_a_damaged_source_is_named(
    how: str, command: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = DAMAGE[how]
    inputs = tmp_path / "inputs.safetensors"
    if how == "NaN weights":  # found when the block is read, and so after the inputs
        config = json.loads((source / "config.json").read_text())
        save_inputs(inputs, [family_of(config).example_inputs(config, (1, 4, 3), 0, torch.bfloat16)])
    else:
        inputs.write_bytes(b"never read")
    damage(source)
    option = "--calibration" if command == "quantize" else "--inputs"
    assert words in _refused(capfd, command, source, "-o", tmp_path / "out", option, inputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux", "inputs.safetensors"]


def test_in_features_that_are_no_multiple_of_16_are_named(
    tiny_flux: MakeFlux, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = tiny_flux(tmp_path / "flux", attention_head_dim=20, axes_dims_rope=(4, 8, 8))
    line = _refused(capfd, "quantize", source, "-o", tmp_path / "out")
    assert "transformer_blocks.0.norm1.linear has 40 in-features" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inputs", [None, b"random bytes", b""])
def test_calibration_inputs_that_are_none_are_refused(
    inputs: bytes | None, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if inputs is not None:
        (tmp_path / "inputs.safetensors").write_bytes(inputs)
    line = _refused(capfd, "quantize", source, "-o", tmp_path / "out", "--calibration", tmp_path / "inputs.safetensors")
    assert "inputs.safetensors" in line
    assert not (tmp_path / "out").exists()


NO_ARTIFACTS = [
    (command, what)
    for command in ("export", "validate", "build", "package", "inspect", "lint")
    for what in ("nothing", "an empty folder", "random bytes", "an ONNX without its data")
    # inspect tells what a graph is from the graph alone, and of missing data lint makes a finding, with status 1
    if not (command in ("inspect", "lint") and what == "an ONNX without its data")
]


@pytest.mark.parametrize(("command", "what"), NO_ARTIFACTS)
def test_what_is_no_artifact_is_refused(
    command: str, what: str, quantized_digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given"
    if what == "an empty folder":
        path.mkdir()
    elif what == "random bytes":
        path = tmp_path / "model.onnx"
        path.write_bytes(bytes(range(256)) * 8)
    elif what == "an ONNX without its data":
        path.mkdir()
        shutil.copy(quantized_digits / "model.onnx", path)
        path = path / "model.onnx" if command != "export" else path
    before = _contents(tmp_path)
    _refused(capfd, command, path, *(["--for", "demo-diffusion"] if command == "package" else []))
    assert _contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "rtx9999"], "rtx9999"),
        (["--gpu", "rtx4090"], "FP4"),
        (["--gpu", "rtx5090,rtx4090"], "rtx4090"),
        (["--resolution", "huge"], "huge"),
        (["--batch", "4:1:2"], "4:1:2"),
        (["--text", "100000"], "100000"),
    ],
)
def test_a_target_that_cannot_be_built_for_is_refused(
    options: list[str], words: str, quantized_digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "x.engine"
    assert words in _refused(capfd, "build", quantized_digits, "-o", engine, *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "validate"])
def test_an_output_that_cannot_be_written_is_refused(
    command: str, commands: Commands, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    # Below a file nothing can be made, not even by root.
    line = _refused(capfd, *commands[command], "-o", file / "below")
    assert f"{file} is not a folder; expected a folder there" in line
    _refused(capfd, *commands[command], "-o", file / "below" / "this.onnx")
    if command in ("quantize", "validate"):
        _refused(capfd, *commands[command], "-o", file)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="makes a named pipe")
@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "validate", "inspect", "lint"])
def test_what_is_no_regular_file_is_neither_read_nor_replaced(
    command: str, commands: Commands, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if command not in ("calibrate", "quantize"):
        assert "pipe is not a regular file" in _refused(capfd, command, pipe)
    if command not in ("inspect", "lint"):
        said = {"quantize": "is a file", "export": "is not a folder", "validate": "is not a folder"}
        line = _refused(capfd, *commands[command], "-o", pipe, "--force")
        assert f"{pipe} {said.get(command, 'is not a regular file')}" in line
    assert pipe.is_fifo()


def test_an_option_of_checkpoints_or_of_graphs_is_refused_where_it_does_nothing(
    quantized_digits: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", tmp_path / "out"]
    assert "is for a third-party graph" in _refused(capfd, "export", quantized_digits, *out, "--allow-slow")
    bf16 = [*out, "--precision", "bf16", "--scale-dtype"]
    assert "--scale-dtype bfloat16 is of block scales" in _refused(capfd, "export", digits, *bf16, "bfloat16")
    graph = quantized_digits / "model.onnx"
    assert "are for checkpoints" in _refused(capfd, "export", graph, *out, "--scale-dtype", "float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write into: /proc")
@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "validate"])
def test_a_folder_that_even_root_cannot_write_is_refused(
    command: str, commands: Commands, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "/proc/nowhere" in _refused(capfd, *commands[command], "-o", "/proc/nowhere/result")


def test_a_checkpoint_whose_graph_cannot_be_read_is_refused(
    copy_of_digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (copy_of_digits / "model.onnx").write_bytes(bytes(range(256)) * 12)
    assert f"{copy_of_digits / 'model.onnx'} is not an ONNX model" in _refused(capfd, "inspect", copy_of_digits)


def test_lint_finds_missing_data(quantized_digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copy(quantized_digits / "model.onnx", tmp_path)
    assert fp4trt.run(["lint", str(tmp_path / "model.onnx")]) == 1
    assert "does not exist" in capfd.readouterr().out


def test_a_plain_checkpoint_is_exported_only_when_bf16_is_asked_for(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "--precision bf16" in _refused(capfd, "export", source)
    assert sorted(path.name for path in source.iterdir()) == ["config.json", WEIGHTS]
