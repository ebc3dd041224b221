"""Runs a build in a child process and ends it for certain: on Ctrl-C, on an error, or when it crashes."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from fp4trt.errors import BuilderFailedError, EngineWriteError

__all__ = ["run_child"]

# The package's parent goes last in the path: first, it could shadow the standard library.
_START = "import sys; sys.path.append(sys.argv[1]); from trt_build.child import main; sys.exit(main())"
_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.25  # a blocking wait cannot be interrupted on Windows


def run_child(request: dict[str, Any], on_progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Build in a child process; return its closing "done" event (see trt_build.child.build_engine).

    `on_progress` is called with (fraction, phase) several times a second, also while nothing moves. However
    this function ends, the child has ended and request["partial"] exists only if it is complete.

    Raises:
        BuilderFailedError: the graph was refused, or the child died.
        EngineWriteError: the engine could not be written in full.
    """
    complete = False
    try:
        with tempfile.TemporaryFile() as errors:
            event = _converse(request, on_progress, errors)
        complete = event["event"] == "done"
    finally:
        if not complete:
            Path(request["partial"]).unlink(missing_ok=True)
    if not complete:
        raise _as_exception(event, request)
    return event


def _converse(request: dict[str, Any], on_progress: Callable[[float, str], None], errors: IO[bytes]) -> dict[str, Any]:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _START, str(Path(__file__).resolve().parent.parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=_read_events, args=(process.stdout, events), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # where the child died at once, its exit status says more
            process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            process.stdin.flush()  # and stays open: its end tells the child that the parent died
        closing = _follow(events, on_progress)
        if closing is None:
            return _crash(process.wait(), errors)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        return closing
    finally:
        _end(process)


def _follow(
    events: queue.Queue[dict[str, Any] | None], on_progress: Callable[[float, str], None]
) -> dict[str, Any] | None:
    """Return the closing event, None where the child ended without one."""
    fraction, phase = 0.0, "starting"
    while True:
        try:
            event = events.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            on_progress(fraction, phase)
            continue
        if event is None or event["event"] != "progress":
            return event
        fraction, phase = event["fraction"], event["phase"]
        on_progress(fraction, phase)


def _read_events(stdout: IO[bytes], events: queue.Queue[dict[str, Any] | None]) -> None:
    with stdout:
        for line in stdout:
            try:
                events.put(json.loads(line))
            except ValueError:
                break  # a line cut short by the end of the child
    events.put(None)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child: politely, then for certain."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _crash(status: int, errors: IO[bytes]) -> dict[str, Any]:
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status == -9:
        said = "it was killed, probably for want of memory"
    return {
        "event": "error",
        "kind": "crash",
        "message": f"exit status {status}; {said}"[:600],
        "errno": None,
    }


def _as_exception(event: dict[str, Any], request: dict[str, Any]) -> Exception:
    message = event["message"]
    if event["kind"] == "write":
        engine = str(Path(request["partial"]).with_suffix(""))
        if event["errno"] is None:
            return EngineWriteError(f"{engine}: {message}; free some disk space and build again")
        return EngineWriteError(event["errno"], message, engine)
    what = {
        "graph": f"{request['backend']} cannot parse {request['onnx']}",
        "build": f"{request['backend']} refused to build {request['onnx']}",
        "crash": f"the {request['backend']} process ended without a result",
    }[event["kind"]]
    return BuilderFailedError(f"{what}: {message}")
