"""Commands that a full disk or Ctrl-C stops: one line, exit status 2, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fp4trt
from tests import warm_python

ROOT = Path(fp4trt.__file__).parents[1]
Commands = dict[str, list[object]]


@contextlib.contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Limit the size of a file, in bytes, for this process and those that it starts."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file as POSIX does")
@pytest.mark.parametrize(
    ("command", "limit"), [("quantize", 60_000), ("export", 100_000), ("build", 1_000_000), ("validate", 9_000)]
)
@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(
    command: str, limit: int, commands: Commands, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with no_file_above(limit):
        status = fp4trt.run([*map(str, commands[command]), "-o", str(tmp_path / "result")])
    said = capfd.readouterr().err
    assert status == 2, said
    assert "Traceback" not in said
    assert [line for line in said.splitlines() if "error:" in line], said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal as a POSIX terminal does")
@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("calibrate", "calibrating"),
        ("quantize", "quantizing blocks"),
        ("export", "exporting"),
        ("validate", "functions"),
        ("build", "memory"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_ends_a_command_in_one_line_and_leaves_nothing_but_what_it_names(
    command: str, shown: str, commands: Commands, tmp_path: Path
) -> None:
    arguments = [*map(str, commands[command]), "-o", str(tmp_path / "result")]
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
    assert all(f"{path} keeps" in text for path in tmp_path.iterdir()), text


@pytest.mark.skipif(sys.platform == "win32", reason="sends the signal as a POSIX terminal does")
@pytest.mark.parametrize("to_all", [True, False])
@pytest.mark.slow
def test_ctrl_c_ends_the_demo_in_one_line_whoever_hears_of_it(to_all: bool, tmp_path: Path) -> None:
    status, text = _interrupted(["demo", "-o", str(tmp_path / "result")], "quantizing blocks", to_all)
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
    with warm_python.started(warm_python.FP4TRT, *arguments, new_session=to_all) as running:
        if running.wait(lambda: shown in running.printed):
            time.sleep(0.2)
            (os.killpg if to_all else os.kill)(running.pid, signal.SIGINT)
            running.wait()
        return running.status, running.printed
