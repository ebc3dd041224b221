"""The child that holds TensorRT: full disks, interruptions, crashes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import trt_build
from fp4trt.errors import BuilderFailedError, EngineWriteError
from trt_build import supervise
from trt_build.callbacks import EngineFile

pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).resolve().parents[2]


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_error_and_leaves_nothing(attention_graph: Any) -> None:
    model = attention_graph()
    before = names_in(model.parent)
    (model.parent / "rtx5090.engine.partial").symlink_to("/dev/full")
    with pytest.raises(EngineWriteError) as caught:
        trt_build.build(model)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.endswith("rtx5090.engine")
    assert caught.value.exit_code == 2
    assert names_in(model.parent) == before


def test_a_directory_that_cannot_be_written_is_an_error(attention_graph: Any, tmp_path: Path) -> None:
    model = attention_graph()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        trt_build.build(model, output=tmp_path / "file" / "out.engine")


def test_the_first_write_error_is_kept_and_later_writes_are_refused(tmp_path: Path) -> None:
    class Full:
        def write(self, data: memoryview) -> int:
            if len(data) < 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return 10

    file = EngineFile(tmp_path / "engine")
    file.file.close()
    file.file = Full()  # type: ignore[assignment]
    assert file.write(b"x" * 20) == 20
    assert file.write(b"x" * 25) == 0
    assert file.write(b"x") == 0
    assert file.error is not None
    assert file.error.errno == errno.ENOSPC
    assert file.offered == 46


class Interrupted(BaseException):
    pass


def test_an_interrupted_build_ends_its_child_and_leaves_nothing(
    attention_graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attention_graph()
    before = names_in(model.parent)
    children: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def remember(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(start(*args, **options))
        return children[-1]

    def interrupt(fraction: float, phase: str) -> None:
        if fraction > 0.1:
            raise Interrupted

    monkeypatch.setattr(supervise.subprocess, "Popen", remember)
    with pytest.raises(Interrupted):
        trt_build.build(model, on_progress=interrupt)
    assert [child.poll() is not None for child in children] == [True]
    assert names_in(model.parent) == before


SLOW_BUILD = """
import sys, trt_build.child, trt_build.builder
{patch}
def on_progress(fraction, phase):
    print(phase, flush=True)
trt_build.builder.build(sys.argv[1], on_progress=on_progress)
"""

# A child that sits in a phase for ever, as a large build does.
STUCK = """
import trt_build.supervise as s
s._START = '''
import sys; sys.path.append(sys.argv[1])
import pathlib, time, trt_build.child as child
def stuck(request, on_progress):
    pathlib.Path(request["partial"]).write_bytes(b"half an engine")
    on_progress(0.5, f"pid {__import__('os').getpid()}")
    time.sleep(600)
child.build_engine = stuck
sys.exit(child.main())
'''
"""


def start_stuck_build(model: Path) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD.format(patch=STUCK), str(model)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("pid "):
            return process, int(line.split()[1])
    raise AssertionError(process.communicate()[1])


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_until_ended(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="sends signals, reads /proc")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_way_to_end_the_command_leaves_a_child_or_a_file(attention_graph: Any, number: str) -> None:
    model = attention_graph()
    before = names_in(model.parent)
    process, child = start_stuck_build(model)
    assert "rtx5090.engine.partial" in names_in(model.parent)
    os.kill(process.pid, getattr(signal, number))
    process.communicate(timeout=20)
    assert wait_until_ended(child)
    assert names_in(model.parent) == before


def test_a_crash_of_the_builder_is_one_line(attention_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention_graph()
    before = names_in(model.parent)
    monkeypatch.setattr(supervise, "_START", "import sys; sys.stderr.write('bad\\nSegmentation fault\\n'); sys.exit(7)")
    with pytest.raises(BuilderFailedError, match="ended without a result: exit status 7; Segmentation fault"):
        trt_build.build(model)
    assert names_in(model.parent) == before


def test_what_the_builder_refuses_is_one_line_with_its_reason(attention_graph: Any, tmp_path: Path) -> None:
    request = {
        "backend": "tensorrt_rtx",
        "onnx": str(attention_graph()),
        "partial": str(tmp_path / "out.engine.partial"),
        "compute_capabilities": ["SM89"],
        "profiles": [{"hidden_states": [[1, 64, 128]] * 3}],
        "weight_streaming": False,
    }
    with pytest.raises(BuilderFailedError, match=r"refused to build .* Cannot compile for target.*sm89.*fp4") as caught:
        supervise.run_child(request, lambda fraction, phase: None)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.engine.partial").exists()
