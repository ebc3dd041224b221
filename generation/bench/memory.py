"""The most memory that this process took: of the system, or of a GPU."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final, Self

from trt_build.runtime.card import Card

__all__ = ["CardWatch", "resident_peak"]

_EVERY_S: Final = 0.005


def resident_peak() -> int | None:
    """Return the system's own high-water mark of this process in bytes; None where the system does not tell."""
    try:
        words = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return None
    return int(words[words.index("VmHWM:") + 1]) * 1024 if "VmHWM:" in words else None


class CardWatch:
    """How much less of a card's memory was free than at the beginning, at most; that of other programs counts too.

    Attributes:
        peak: bytes.
    """

    def __init__(self, card: Card) -> None:
        self.peak = 0
        self._card = card
        self._free = card.memory()[0]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        self.peak = max(self.peak, self._free - self._card.memory()[0])

    def _watch(self) -> None:
        while not self._stopped.wait(_EVERY_S):
            self._look()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._stopped.set()
        self._thread.join()
