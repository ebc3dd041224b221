"""What the front door adds to every room's command: `--json`, one-line errors and the exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import click
import pytest

import fp4trt


class BadThing(ValueError):
    exit_code = 2


class FailedCheck(ValueError):
    exit_code = 1


def run_fake(monkeypatch, callback, *arguments: str) -> int:
    """Register `callback` as the command `fake` in the table and run it through the front door."""
    room = types.ModuleType("fake_room")
    room.fake = click.Command("fake", params=[click.Option(["--size"], type=int)], callback=callback)
    monkeypatch.setitem(sys.modules, "fake_room", room)
    monkeypatch.setitem(fp4trt.COMMANDS, "fake", fp4trt.Entry("fake_room:fake", "A fake."))
    return fp4trt.run(["fake", *arguments])


def raising(error: BaseException):
    def callback(size):
        raise error

    return callback


def test_human_lines_go_to_stdout_without_json(monkeypatch, capfd):
    assert run_fake(monkeypatch, lambda size: click.echo("a line") or {"size": size}, "--size", "3") == 0
    assert capfd.readouterr() == ("a line\n", "")


def test_json_is_one_object_on_stdout_and_every_other_writer_moves_to_stderr(monkeypatch, capfd):
    def talkative(size):
        click.echo("from click")
        print("from print")
        os.write(1, b"from a native library\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        return {"size": size, "nested": {"path": Path("a"), "list": [1, 2.5, float("inf"), float("nan")]}}

    assert run_fake(monkeypatch, talkative, "--size", "3", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"size": 3, "nested": {"path": "a", "list": [1, 2.5, None, None]}}
    assert out.count("\n") == 1
    assert sorted(err.splitlines()) == ["from a child", "from a native library", "from click", "from print"]


def test_of_several_processes_only_the_first_speaks(monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    for arguments in ((), ("--json",)):
        assert run_fake(monkeypatch, lambda size: click.echo("a line") or {"passed": False}, *arguments) == 1
    assert capfd.readouterr() == ("", "")


def test_a_writer_that_kept_the_stdout_stream_is_moved_too():
    script = """if True:
        import sys, types, click, fp4trt
        kept = sys.stdout
        sys.modules["room"] = room = types.ModuleType("room")
        room.fake = click.Command("fake", callback=lambda: kept.write("kept") and {})
        fp4trt.COMMANDS["fake"] = fp4trt.Entry("room:fake", "")
        sys.exit(fp4trt.run(["fake", "--json"]))
    """
    root = Path(fp4trt.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{}\n", "kept")


def test_stdout_is_itself_again_after_json(monkeypatch, capfd):
    run_fake(monkeypatch, lambda size: {}, "--json")
    os.write(1, b"later\n")
    assert capfd.readouterr().out == "{}\nlater\n"


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_result_that_did_not_pass_exits_with_1_and_is_still_printed(monkeypatch, capfd, arguments):
    assert run_fake(monkeypatch, lambda size: {"passed": False}, *arguments) == 1
    assert capfd.readouterr().out == ('{"passed": false}\n' if arguments else "")


def test_a_result_that_passed_exits_with_0(monkeypatch):
    assert run_fake(monkeypatch, lambda size: {"passed": True}) == 0


@pytest.mark.parametrize("arguments", [(), ("--json",)])
@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BadThing("found 1,\n  expected 2"), 2, "found 1, expected 2"),
        (FailedCheck("layer x differs"), 1, "layer x differs"),
        (FileNotFoundError(2, "No such file", "gone.json"), 2, "gone.json: No such file"),
        (OSError("the disk is full"), 2, "the disk is full"),
        (KeyboardInterrupt(), 2, "interrupted"),
        (click.UsageError("pick one"), 2, "pick one"),
        (
            ModuleNotFoundError("No module named 'torch.onnx'", name="torch.onnx"),
            2,
            'the package torch is needed and not installed; try: pip install "fp4trt[quantize]"',
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_foreseen_error_is_one_line_on_stderr(monkeypatch, capfd, error, status, line, arguments):
    assert run_fake(monkeypatch, raising(error), *arguments) == status
    assert capfd.readouterr() == ("", f"fp4trt fake: error: {line}\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError("x", name="not_ours")])
def test_an_unforeseen_error_is_a_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run_fake(monkeypatch, raising(error))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fake", "--size", "x"], "fp4trt fake: error: Invalid value for '--size': 'x' is not"),
        (["fake", "--sise", "1"], "fp4trt fake: error: No such option '--sise'."),
        (["nothing"], "fp4trt: error: No such command 'nothing'."),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(monkeypatch, capfd, arguments, line):
    run_fake(monkeypatch, lambda size: None)
    capfd.readouterr()
    assert fp4trt.run(arguments) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(line)


def test_the_room_s_own_command_is_left_as_it_was(monkeypatch):
    run_fake(monkeypatch, lambda size: None)
    assert [option.name for option in sys.modules["fake_room"].fake.params] == ["size"]


def test_version_is_the_distribution_s(capfd):
    assert fp4trt.run(["--version"]) == 0
    assert capfd.readouterr().out == f"fp4trt, version {fp4trt.__version__}\n"


def test_no_arguments_shows_the_help_and_exits_with_2(capfd):
    assert fp4trt.run([]) == 2
    assert "Commands:" in capfd.readouterr().err


def test_python_m_runs_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fp4trt", "nothing"],
        cwd=Path(fp4trt.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "fp4trt: error: No such command 'nothing'.\n",
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "digits"], ["inspect", "digits", "--json"]])
def test_a_reader_that_leaves_ends_the_command_without_a_word(arguments, unbuffered, digits):
    arguments = [str(digits) if word == "digits" else word for word in arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "fp4trt", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(fp4trt.__file__).parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )
    process.stdout.close()  # before anything can have been written
    said = process.stderr.read()
    assert b"error" not in said
    assert said == b"" or "--json" in arguments  # with it, the human lines are there
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal as a POSIX terminal does")
@pytest.mark.parametrize(
    ("when", "status", "said"),
    [
        ("cli._run = lambda words, run=cli._run: (run(words), interrupt())[0]", 2, "fp4trt: error: interrupted\n"),
        ("sys.exit = lambda status, leave=sys.exit: (interrupt(), leave(status))", 0, ""),
    ],
)
def test_ctrl_c_behind_the_end_of_a_command_is_no_death_by_the_signal(when, status, said):
    code = "import os, signal, sys\nfrom fp4trt import cli\ninterrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    command = [sys.executable, "-c", f"{code}{when}\ncli.main()", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(fp4trt.__file__).parents[1])
    assert (done.returncode, done.stderr) == (status, said)
    assert done.stdout.startswith("fp4trt")


@pytest.mark.parametrize("command", ["quantize", "export"])
def test_an_empty_path_is_not_taken_for_the_current_folder(command, capfd):
    assert fp4trt.run([command, "digits", "-o", ""]) == 2
    assert "'--output': it is empty; expected the name of a file or folder" in capfd.readouterr().err
