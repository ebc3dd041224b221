"""Progress and notes of long work: the library reports them, whoever called decides what becomes of them.

A verb's ``progress`` argument is called with each step; the command line draws bars on stderr. Notes are one-line
messages, such as that a run resumes, or a warning: they are printed on stderr unless :func:`reporting` sends them
elsewhere.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import click

__all__ = ["PATIENCE_S", "Progress", "Step", "note", "note_once", "on_terminal", "reporting", "tracking"]


@dataclass(frozen=True)
class Step:
    """How far a piece of work is.

    Attributes:
        label: what is being done, such as ``quantizing blocks``.
        done: units that are finished: blocks, bytes, steps.
        total: of how many.
        detail: what is worth adding, such as the loss; may be empty.
    """

    label: str
    done: int
    total: int
    detail: str = ""


Progress = Callable[[Step], object]
"""Called with each step of long work, on any thread."""

PATIENCE_S: Final = 2.0
"""Seconds that work which is often quick takes before it is reported."""

_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
_said: ContextVar[set[str] | None] = ContextVar("said", default=None)
_note: ContextVar[Callable[[str], object]] = ContextVar("note", default=lambda text: click.echo(text, err=True))


@contextmanager
def reporting(progress: Progress | None = None, note: Callable[[str], object] | None = None) -> Iterator[None]:
    """Send progress and notes of what is called within to these functions; None leaves them where they go."""
    tokens: list[tuple[ContextVar[Any], Any]] = []
    if _said.get() is None:
        tokens.append((_said, _said.set(set())))
    if progress is not None:
        tokens.append((_progress, _progress.set(progress)))
    if note is not None:
        tokens.append((_note, _note.set(note)))
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def note(text: str) -> None:
    """Report one line."""
    _note.get()(text)


def note_once(text: str) -> None:
    """Report one line, the first time that it is said within the outermost :func:`reporting`; elsewhere, never.

    So a verb says it once, however often it comes across it, and its workers do not repeat it.
    """
    said = _said.get()
    if said is not None and text not in said:
        said.add(text)
        note(text)


@contextmanager
def tracking(length: int, label: str, patience: float = 0.0) -> Iterator[Callable[..., None]]:
    """Give a function to call after each step, with how many units are done since the last one and a detail.

    A call that changes neither is not reported, so that what is reported goes up from 0.

    Args:
        length: units in all.
        label: what is being done.
        patience: seconds in which nothing is reported.
    """
    tell, done, shown, lock, begun = _progress.get(), 0, "", threading.Lock(), time.monotonic()

    def advance(count: int = 1, detail: str = "") -> None:
        nonlocal done, shown
        with lock:  # several threads may share the work
            if not count and detail == shown:
                return
            done, shown = done + count, detail
            if tell is not None and time.monotonic() - begun >= patience:
                tell(Step(label, done, length, detail))

    if tell is not None and not patience:
        tell(Step(label, 0, length))
    yield advance


@contextmanager
def on_terminal() -> Iterator[None]:
    """Draw bars with an ETA on stderr for what is called within."""
    with _Bars() as bars, reporting(bars.show):
        yield


class _Bars:
    """The bars of a command, one after another."""

    def __init__(self) -> None:
        self._of = ("", 0)
        self._bar: Any = None
        self._stack = ExitStack()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, step: Step) -> None:
        """Draw a step."""
        if (step.label, step.total) != self._of or step.done < self._bar.pos:
            self._stack.close()
            self._of = (step.label, step.total)
            self._bar = self._stack.enter_context(
                click.progressbar(
                    length=step.total,
                    label=step.label,
                    file=sys.stderr,
                    show_eta=True,
                    item_show_func=lambda detail: detail or None,
                )
            )
        self._bar.update(step.done - self._bar.pos, step.detail)
