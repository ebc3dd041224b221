"""A folder of unfinished work is known again after a kill at any moment, and a user's is left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4trt.errors import OutputExists
from fp4trt.work_folder import work_folder, write_mark

MARK = "mark.json"

KILLED = """
import os, signal, sys
from pathlib import Path
from fp4trt.work_folder import work_folder, write_mark
from fp4trt import work_folder as module

folder, moment = Path(sys.argv[1]), sys.argv[2]
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if moment == "half-written mark":
    module.os.replace = die
begin = die if moment == "no mark" else lambda: write_mark(folder, "mark.json", {})
with work_folder(folder, "mark.json", lambda: False, begin, lambda: "all"):
    (folder / "finished").write_text("some")
    die()
"""


def _begun(folder: Path) -> Callable[[], None]:
    return lambda: write_mark(folder, MARK, {})


def _nothing() -> str:
    return ""


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.parametrize("moment", ["no mark", "half-written mark", "with its mark"])
def test_what_a_kill_left_is_taken_over(moment: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, moment], cwd=root, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr.decode()
    assert folder.is_dir()
    assert (folder / MARK).exists() == (moment == "with its mark")
    with work_folder(folder, MARK, lambda: False, _begun(folder), _nothing):
        assert [path.name for path in folder.iterdir()] == [MARK]
    assert not folder.exists()


def test_a_run_that_can_go_on_finds_what_is_finished(tmp_path: Path) -> None:
    folder = tmp_path / "work"

    def finish_some() -> None:
        (folder / "finished").write_text("some")
        raise OSError("full")

    with pytest.raises(OSError, match="full"), work_folder(folder, MARK, lambda: False, _begun(folder), lambda: "it"):
        finish_some()
    with work_folder(folder, MARK, lambda: True, _begun(folder), _nothing):
        assert (folder / "finished").read_text() == "some"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, ValueError])
def test_with_nothing_to_keep_an_error_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "work"
    with pytest.raises(error), work_folder(folder, MARK, lambda: False, _begun(folder), _nothing):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["thesis.txt", "mark.json.partial.txt"])
def test_a_folder_of_the_users_is_refused_and_left(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with (
        pytest.raises(OutputExists, match="is in the way"),
        work_folder(tmp_path, MARK, lambda: False, _begun(tmp_path), _nothing),
    ):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
