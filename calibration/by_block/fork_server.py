"""The process that workers are forked from. It starts early, to import the libraries while this process does."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver
from typing import Any, Final

__all__ = ["PRELOADED", "context", "start_early"]

PRELOADED: Final = ["calibration.by_block.workers", "diffusers.models.transformers"]
"""Modules that every worker needs, and that take seconds to import."""


def context() -> Any:
    """Return how workers are started: forked from that process, where the system can fork, and spawned elsewhere."""
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    return multiprocessing.get_context("forkserver" if forks else "spawn")


def start_early() -> None:
    """Start the process that workers are forked from, where the system can fork and it does not run yet."""
    chosen = context()
    if chosen.get_start_method() != "forkserver":
        return
    chosen.set_forkserver_preload(PRELOADED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which is this process's to hear
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
