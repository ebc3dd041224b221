"""Python programs that find torch, diffusers and ModelOpt imported: importing them takes longer than what is tested.

A server imports them once and forks for each program.
"""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FP4TRT = "import fp4trt\nfp4trt.main()"
"""The command itself, as `python -m fp4trt`."""

IMPORTED = ["calibration.quantization", "diffusers.models.transformers.transformer_flux", "modelopt.torch.quantization"]


@functools.cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


class Running:
    """A program that was started."""

    def __init__(self, code: str, arguments: tuple[object, ...], new_session: bool) -> None:
        self._said = bytearray()
        ours, its = _context().Pipe(duplex=False)
        self.process = _context().Process(target=_run, args=(code, tuple(map(str, arguments)), its, new_session))
        self.process.start()
        its.close()
        self._listener = threading.Thread(target=self._listen, args=(ours,), daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def status(self) -> int:
        """Its exit status, negative where a signal ended it."""
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def printed(self) -> str:
        """What it has printed so far, to stdout and stderr."""
        return self._said.decode("utf-8", "replace")

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end, or until something is so; return whether it runs on."""
        while self.process.is_alive():
            if until():
                return True
            time.sleep(0.01)
        self._listener.join(5)
        return False

    def _listen(self, pipe: Connection) -> None:
        with pipe:
            while some := os.read(pipe.fileno(), 4096):
                self._said += some


@contextlib.contextmanager
def started(code: str, *arguments: object, new_session: bool = False) -> Iterator[Running]:
    """Start a program in the root of the repository, as `python -u -c CODE ARGUMENTS`; kill it at the end."""
    running = Running(code, arguments, new_session)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.join()


def run(code: str, *arguments: object) -> tuple[int, str]:
    """Run a program to its end; return its exit status and what it printed. On Windows it starts cold."""
    if sys.platform == "win32":
        command = [sys.executable, "-u", "-c", code, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        return done.returncode, done.stdout.decode("utf-8", "replace")
    with started(code, *arguments) as running:
        running.wait()
        return running.status, running.printed


def _run(code: str, arguments: tuple[str, ...], output: Connection, new_session: bool) -> None:
    if new_session:
        os.setsid()
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), "utf-8", write_through=True) for n in (1, 2))
    output.close()
    os.chdir(ROOT)
    sys.argv = ["fp4trt", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
