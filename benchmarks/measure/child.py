"""Run a command in a process of its own and say what it cost.

A peak of memory belongs to a process, so whatever is measured gets a fresh one. It is the system's own high-water mark
(VmHWM on Linux, the peak working set on Windows; elsewhere the largest size that was seen), asked of the command and of
all the processes that it started, and added up over those that live at one time: never below the true peak of the whole
tree, save for what was added after it was asked last. It is asked every 20 ms at first, and less often the longer the
command runs (`SHARE` of the time that it has run), since asking takes a processor's time too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
INTERVAL = 0.02
SHARE = 1 / 500


class ChildFailed(RuntimeError):
    """A measured command ended with an error; the message holds the last lines that it wrote."""


@dataclass(frozen=True)
class Cost:
    """What a command took, and the JSON object that it printed last, if any.

    ``disk_read`` counts the bytes that the system fetched from the disk for it, not what the cache had; 0 where the
    system does not tell.
    """

    seconds: float
    core_seconds: float
    peak_rss: int
    disk_read: int
    answer: dict[str, Any]


def fp4trt(*words: str | Path) -> Cost:
    """Run a command of fp4trt with --json."""
    return run([sys.executable, "-m", "fp4trt", *map(str, words), "--json"])


def itself(*words: str | Path) -> Cost:
    """Run the calling script again with other words, as the process that does one thing."""
    return run([sys.executable, sys.argv[0], *map(str, words)])


def run(command: Sequence[str]) -> Cost:
    """Run a command that finds the modules of this repository.

    Raises:
        ChildFailed
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=said, stderr=complained, env=environment)
        watch = _Watch(child.pid)
        status = child.wait()
        seconds = time.perf_counter() - started
        watch.stop()
        said.seek(0)
        complained.seek(0)
        if status != 0:
            last = b"\n".join(complained.read().splitlines()[-8:]).decode(errors="replace")
            raise ChildFailed(f"{' '.join(command[1:])} ended with {status}:\n{last}")
        last = (said.read().decode().splitlines() or [""])[-1]
    answer = json.loads(last) if last.startswith("{") else {}
    return Cost(seconds, watch.core_seconds, watch.peak, watch.disk_read, answer)


class _Watch:
    """Follows a process and its descendants until told to stop."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._started = time.perf_counter()
        self._core_seconds: dict[int, float] = {}
        self._disk_read: dict[int, int] = {}
        self._stopped = threading.Event()
        self._process = psutil.Process(pid)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    @property
    def core_seconds(self) -> float:
        return sum(self._core_seconds.values())

    @property
    def disk_read(self) -> int:
        return sum(self._disk_read.values())

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stopped.wait(max(INTERVAL, SHARE * (time.perf_counter() - self._started))):
            try:
                tree = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(self._look_at(process) for process in tree))

    def _look_at(self, process: psutil.Process) -> int:
        """Note the processor time of one process; return its peak in bytes."""
        try:
            times = process.cpu_times()
            self._core_seconds[process.pid] = times.user + times.system
            if hasattr(process, "io_counters"):  # not on macOS
                self._disk_read[process.pid] = process.io_counters().read_bytes
            return _peak_of(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return 0


def _peak_of(process: psutil.Process) -> int:
    try:
        words = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        memory = process.memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    return int(words[words.index("VmHWM:") + 1]) * 1024 if "VmHWM:" in words else 0
