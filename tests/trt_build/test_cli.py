from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fp4trt.errors import LintError, UnknownGpuError
from trt_build.cli import build_command


def call(*arguments: str) -> Any:
    return CliRunner().invoke(build_command, list(arguments), standalone_mode=False)


def test_help_ends_with_an_example() -> None:
    text = CliRunner().invoke(build_command, ["--help"]).output
    assert "Example:" in text.splitlines()[-3]
    assert text.splitlines()[-2].startswith("    fp4trt build flux-fp4 --gpu rtx5090")
    assert text.splitlines()[-1].startswith(
        '    fp4trt build flux-fp4 --text 512 --profile "resolution=1024 batch=1" --pr'
    )


def test_the_command_prints_one_line_and_returns_the_result(attention_graph: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = attention_graph()
    output = model.parent / "named.engine"
    arguments = (
        str(model.parent),
        "--gpu",
        "rtx5080",
        "--resolution",
        "1024",
        "--batch",
        "1:1:4",
        "-o",
        str(output),
    )
    done = call(*arguments)
    assert done.exception is None, done.output
    assert done.return_value["engine"] == str(output)
    assert Path(done.return_value["manifest"]) == output.with_suffix(".json")
    assert done.stdout.count("\n") == 1
    assert "2 FP4 GEMMs cover 4 of 4 quantized linears" in done.stdout
    assert "memory: the build of" in done.stderr
    again = call(*arguments)
    assert again.return_value["cached"]
    assert "unchanged, not built again" in again.stdout


def test_errors_pass_to_the_front_door_with_their_exit_code(attention_graph: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    unknown = call(str(attention_graph()), "--gpu", "voodoo2")
    assert isinstance(unknown.exception, UnknownGpuError)
    lost = call(str(attention_graph("lost", unquantized_input=True)))
    assert isinstance(lost.exception, LintError)
    slow = call(str(attention_graph("slow", unquantized_input=True)), "--allow-slow")
    assert "16 bit: block.to_out: its input comes from Tanh" in slow.stdout
