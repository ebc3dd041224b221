"""What a user can get wrong in the files that all rooms read: one exception type per kind of mistake."""

from __future__ import annotations

__all__ = ["BadCheckpoint", "UnknownFamily"]


class BadCheckpoint(ValueError):
    """A checkpoint is missing, damaged, or not what its config says."""

    exit_code = 2


class UnknownFamily(ValueError):
    """No model family of ours fits the config."""

    exit_code = 2
