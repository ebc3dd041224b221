"""Bad input, through the command: one clear line on stderr, exit status 2, nothing left behind, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import fp4trt

ROOT = Path(fp4trt.__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
MakeFlux = Callable[..., Path]


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


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing weights": (lambda source: (source / WEIGHTS).unlink(), "does not exist"),
    "truncated weights": (lambda s: (s / WEIGHTS).write_bytes((s / WEIGHTS).read_bytes()[:-9]), "ends at byte"),
    "NaN weights": (_nan, "transformer_blocks.0.ff.net.2.weight holds NaN"),
    "other config": (_other_width, "context_embedder.weight is [32, 32]"),
    "missing config": (lambda source: (source / "config.json").unlink(), "has no config.json"),
    "binary config": (lambda source: (source / "config.json").write_bytes(b"\xff\x00"), "is not JSON"),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("command", ["quantize", "calibrate"])
def test_a_damaged_source_is_named(
    how: str, command: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = DAMAGE[how]
    damage(source)
    inputs = tmp_path / "inputs.safetensors"
    inputs.write_bytes(b"never read")
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
    for command in ("export", "validate", "build", "inspect", "lint")
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
    _refused(capfd, command, path)
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


def _commands(quantized_digits: Path) -> dict[str, list[object]]:
    inputs = quantized_digits / "calibration" / "inputs.safetensors"
    return {
        "calibrate": ["calibrate", "digits", "--inputs", inputs],
        "quantize": ["quantize", "digits", "--recipe", "nvfp4-ptq", "--calibration", inputs],
        "export": ["export", quantized_digits],
        "build": ["build", quantized_digits],
        "validate": ["validate", quantized_digits],
    }


@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "validate"])
def test_an_output_that_cannot_be_written_is_refused(
    command: str, quantized_digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    # Below a file nothing can be made, not even by root.
    line = _refused(capfd, *_commands(quantized_digits)[command], "-o", file / "below")
    assert f"{file} is no folder; expected a folder there" in line
    _refused(capfd, *_commands(quantized_digits)[command], "-o", file / "below" / "this.onnx")
    if command in ("quantize", "validate"):
        _refused(capfd, *_commands(quantized_digits)[command], "-o", file)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(sys.platform == "win32", reason="makes a named pipe")
@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "validate", "inspect", "lint"])
def test_what_is_no_regular_file_is_neither_read_nor_replaced(
    command: str, quantized_digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    if command not in ("calibrate", "quantize"):
        assert "pipe is not a regular file" in _refused(capfd, command, pipe)
    if command not in ("inspect", "lint"):
        said = {"quantize": "is a file", "export": "is no folder", "validate": "is no folder"}
        line = _refused(capfd, *_commands(quantized_digits)[command], "-o", pipe, "--force")
        assert f"{pipe} {said.get(command, 'is not a regular file')}" in line
    assert pipe.is_fifo()


FOREIGN: dict[str, tuple[dict[str, object], str]] = {
    "blocks along the first axis": ({"axis": 0}, "node of m asks for blocks along axis 0"),
    "blocks of 32": ({"block_size": 32}, "node of m asks for blocks of 32"),
    "no domain": ({"domain": ""}, "node of m is a TRT_FP4QDQ in the domain ''; expected 'trt'"),
    "another operator": ({"op_type": "TRT_FP4DynamicQDQ"}, "is a TRT_FP4DynamicQDQ, which no graph may hold"),
}


def _marked(**marking: object) -> onnx.ModelProto:
    """Return ``x [B, 32] @ w^T`` of an inline weight that one placeholder marks."""
    mark = {"op_type": "TRT_FP4QDQ", "domain": "trt", "inputs": ["w"], "outputs": ["m"], "name": "node of m", **marking}
    turn = helper.make_node("Transpose", ["m"], ["t"], perm=[1, 0])
    nodes = [helper.make_node(**mark), turn, helper.make_node("MatMul", ["x", "t"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 32]) for name in ("x", "y"))
    weight = helper.make_tensor("w", TensorProto.FLOAT, [32, 32], bytes(4096), raw=True)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("trt", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weight]), opset_imports=opsets)


def _refused_export(model: onnx.ModelProto, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Export a graph that must be refused before anything is begun, and return the one line."""
    onnx.save(model, folder / "theirs.onnx")
    before = _contents(folder)
    assert fp4trt.run(["export", str(folder / "theirs.onnx"), "-o", str(folder / "ours")]) == 2
    out, err = capfd.readouterr()
    assert _contents(folder) == before
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_graph_that_marks_its_weights_oddly_is_refused(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marking, words = FOREIGN[how]
    assert words in _refused_export(_marked(**marking), tmp_path, capfd)


def _cut_raw(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = bytes(100)


def _cut_typed(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0] * 7)


def _cut_constant(model: onnx.ModelProto) -> None:
    _cut_raw(model)
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))


def _no_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.UNDEFINED


def _beside(length: str) -> Callable[[onnx.ModelProto], None]:
    """Return what moves the weight into w.bin, as if it had another length there."""

    def damage(model: onnx.ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="w.bin")
        weight.external_data.add(key="length", value=length)

    return damage


def _untyped(of: str, field: str) -> Callable[[onnx.ModelProto], None]:
    """Return what makes a graph not say the type, or the shape, of its input or output."""

    def damage(model: onnx.ModelProto) -> None:
        value = getattr(model.graph, of)[0]
        (value if field == "type" else value.type.tensor_type).ClearField(field)

    return damage


def _no_output(model: onnx.ModelProto) -> None:
    del model.graph.node[0].output[:]


FOREIGN_DAMAGE: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "raw data cut short": (_cut_raw, "w has 100 bytes of data, its shape [32, 32] needs 4096"),
    "typed data cut short": (_cut_typed, "w has 28 bytes of data, its shape [32, 32] needs 4096"),
    "a Constant cut short": (_cut_constant, "w has 100 bytes of data, its shape [32, 32] needs 4096"),
    "a weight without a type": (_no_type, "w has no element type"),
    "an output without a shape": (_untyped("output", "shape"), "the output y has no shape"),
    "an output without a type": (_untyped("output", "type"), "the output y has no type"),
    "an input without a shape": (_untyped("input", "shape"), "the input x has no shape"),
    "a placeholder without an output": (_no_output, "has 1 inputs and 0 outputs; expected 1 and 1"),
    "external data of another length": (_beside("10"), "w has 10 bytes of external data, its shape [32, 32]"),
    "external data of no length": (_beside("0"), "w has 0 bytes of external data, its shape [32, 32]"),
}


@pytest.mark.parametrize("how", FOREIGN_DAMAGE)
def test_a_damaged_foreign_graph_is_refused_before_its_export_begins(
    how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, words = FOREIGN_DAMAGE[how]
    (tmp_path / "w.bin").write_bytes(bytes(4096))
    model = _marked()
    damage(model)
    assert words in _refused_export(model, tmp_path, capfd)


def test_an_option_of_checkpoints_or_of_graphs_is_refused_where_it_does_nothing(
    quantized_digits: Path, digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = ["-o", tmp_path / "out"]
    assert "--allow-slow is for a graph" in _refused(capfd, "export", quantized_digits, *out, "--allow-slow")
    bf16 = [*out, "--precision", "bf16", "--scale-dtype"]
    assert "--scale-dtype bfloat16 is of block scales" in _refused(capfd, "export", digits, *bf16, "bfloat16")
    graph = quantized_digits / "model.onnx"
    assert "are for checkpoints" in _refused(capfd, "export", graph, *out, "--scale-dtype", "float32")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write into: /proc")
@pytest.mark.parametrize("command", ["calibrate", "quantize", "export", "build", "validate"])
def test_a_folder_that_even_root_cannot_write_is_refused(
    command: str, quantized_digits: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "/proc/nowhere" in _refused(capfd, *_commands(quantized_digits)[command], "-o", "/proc/nowhere/result")


FULL_DISK = """
import resource, sys

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
import fp4trt

sys.exit(fp4trt.run(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file as POSIX does")
@pytest.mark.parametrize(
    ("command", "limit"), [("quantize", 500_000), ("export", 100_000), ("build", 1_000_000), ("validate", 9_000)]
)
def test_a_full_disk_leaves_nothing_behind(command: str, limit: int, quantized_digits: Path, tmp_path: Path) -> None:
    arguments = [*_commands(quantized_digits)[command], "-o", tmp_path / "result"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(limit), *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error:" in line], done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal as a POSIX terminal does")
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("calibrate", "calibrating"),
        ("quantize", "calibrating"),
        ("export", "exporting"),
        ("validate", "functions"),
        ("build", "memory"),
    ],
)
def test_ctrl_c_ends_a_command_in_one_line_and_leaves_nothing(
    command: str, shown: str, quantized_digits: Path, tmp_path: Path
) -> None:
    arguments = [*map(str, _commands(quantized_digits)[command]), "-o", str(tmp_path / "result")]
    for _ in range(3):
        status, text = _interrupted(arguments, shown)
        if status:
            break
        # The signal came when nothing was left to do: once more.
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert status == 2, text
    assert text.strip().splitlines()[-1].endswith("error: interrupted"), text
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal as a POSIX terminal does")
@pytest.mark.parametrize("to_all", [True, False])
def test_ctrl_c_ends_the_demo_in_one_line_whoever_hears_of_it(to_all: bool, tmp_path: Path) -> None:
    status, text = _interrupted(["demo", "-o", str(tmp_path / "result")], "calibrating", to_all)
    assert status == 2, text
    said = [line for line in text.splitlines() if "error:" in line]
    assert len(said) == 1, text
    assert said[0].endswith("error: interrupted")
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED_WHILE_DELETING = """
import os, signal, sys, time
import click, fp4trt

class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        [None for _ in range(1000)]

@click.command()
def command():
    Deleted()
    time.sleep(1)
    print("went on")

sys.modules["room"] = type(sys)("room")
sys.modules["room"].command = command
fp4trt.COMMANDS["command"] = fp4trt.Entry("room:command", "")
sys.argv = ["fp4trt", "command"]
fp4trt.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal as a POSIX terminal does")
def test_ctrl_c_is_heard_while_an_object_is_deleted() -> None:
    command = [sys.executable, "-c", _INTERRUPTED_WHILE_DELETING]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fp4trt command: error: interrupted\n"


def _interrupted(arguments: list[str], shown: str, to_all: bool = False) -> tuple[int, str]:
    """Run a command, press Ctrl-C soon after it has shown some words; return its status and what it printed.

    `to_all` sends the signal to the processes that it has started too, as a terminal does.
    """
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fp4trt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        cwd=ROOT,
        start_new_session=to_all,
    )
    assert process.stdout is not None
    seen = ""
    while shown not in seen and process.poll() is None:
        seen += process.stdout.read(1)
    time.sleep(0.2)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    return process.returncode, seen + rest


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
