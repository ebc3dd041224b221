"""A progress bar on stderr for work that turns out to take more than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

__all__ = ["progress"]

_PATIENCE_S = 2.0


@contextmanager
def progress(length: int, label: str) -> Iterator[Callable[[], None]]:
    """Give a function to call after each of ``length`` steps; quick work leaves no trace on the terminal."""
    started = time.monotonic()
    pending = 0
    shown = False
    bar = click.progressbar(length=length, label=label, file=sys.stderr, show_eta=True)

    def advance() -> None:
        nonlocal pending, shown
        pending += 1
        if not shown and time.monotonic() - started > _PATIENCE_S:
            bar.__enter__()
            shown = True
        if shown:
            bar.update(pending)
            pending = 0

    try:
        yield advance
    finally:
        if shown:
            bar.__exit__(None, None, None)
