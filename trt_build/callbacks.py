"""What TensorRT calls during a build: a log, a progress monitor and a stream writer.

TensorRT swallows every exception of a callback, and a writer that fails does not fail the build; so each of
them records what happened and the caller looks afterwards. `trt` is the tensorrt_rtx or the tensorrt module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trt_build.layer_info import is_layer_message
from trt_build.progress import PhaseTree

__all__ = ["EngineFile", "LogRecord", "make_logger", "make_monitor", "make_writer"]


class LogRecord:
    """The parts of a verbose build log that matter: the layer information and the errors."""

    def __init__(self) -> None:
        self.layers = ""
        self.errors: list[str] = []

    def add(self, is_error: bool, message: str) -> None:
        """Take one message of the log."""
        if is_error:
            self.errors.append(message)
        elif is_layer_message(message):
            self.layers += message + "\n"


class EngineFile:
    """A file that takes an engine's bytes: counted, hashed, and with its first error kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.offered = 0
        self.error: OSError | None = None
        self.file = path.open("wb", buffering=0)

    def write(self, data: bytes) -> int:
        """Write all of `data`; return its length, or 0 once anything failed."""
        self.offered += len(data)
        if self.error is not None:
            return 0
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.error = error
            return 0
        self.digest.update(data)
        return len(data)


def make_logger(trt: Any, record: LogRecord) -> Any:
    """Return an ILogger that keeps the record."""
    grave = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    def log(_: Any, severity: Any, message: str) -> None:
        record.add(severity in grave, message)

    return _subclass(trt.ILogger, log=log)


def make_monitor(trt: Any, on_progress: Callable[[float, str], None]) -> Any:
    """Return an IProgressMonitor that reports (fraction, phase)."""
    tree = PhaseTree()

    def phase_start(_: Any, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        tree.start(phase_name, parent_phase, num_steps)
        on_progress(tree.fraction, tree.phase)

    def step_complete(_: Any, phase_name: str, step: int) -> bool:
        tree.step(phase_name, step)
        on_progress(tree.fraction, tree.phase)
        return True

    def phase_finish(_: Any, phase_name: str) -> None:
        tree.finish(phase_name)

    return _subclass(
        trt.IProgressMonitor, phase_start=phase_start, step_complete=step_complete, phase_finish=phase_finish
    )


def make_writer(trt: Any, file: EngineFile) -> Any:
    """Return an IStreamWriter into an engine file."""

    def write(_: Any, data: bytes) -> int:
        return file.write(data)

    return _subclass(trt.IStreamWriter, write=write)


def _subclass(interface: type[Any], **methods: Callable[..., Any]) -> Any:
    """Return an instance of an interface that TensorRT calls; its module is known only at run time."""
    return type(interface.__name__.removeprefix("I"), (interface,), methods)()
