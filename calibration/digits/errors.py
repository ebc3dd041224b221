"""How the demo can fail."""

from __future__ import annotations

__all__ = ["StageFailed"]


class StageFailed(RuntimeError):
    """A stage of the demo ended with an error that it has printed itself; ``exit_code`` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
