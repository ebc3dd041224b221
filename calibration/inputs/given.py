"""The files that a user gives to calibrate by: amax values, or captured inputs; recognized without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fp4trt.errors import BadInputs
from fp4trt.file_kind import is_file, what_it_lacks

__all__ = ["is_amax", "paths_of", "require_captured"]


def paths_of(given: str | Path | Sequence[str | Path] | None) -> list[Path]:
    """Return the files of what was given: one, several or none."""
    return [Path(path) for path in ([given] if isinstance(given, str | Path) else given or ())]


def is_amax(given: str | Path | Sequence[str | Path] | None) -> bool:
    """Whether what calibrates is one or more files of amax, and not captured inputs."""
    files = paths_of(given)
    return len(files) > 1 or any(path.suffix == ".json" for path in files)


def require_captured(path: Path) -> None:
    """Require that a file of captured inputs is there.

    Raises:
        BadInputs: it is not.
    """
    if not is_file(path):
        raise BadInputs(
            f"{path} {what_it_lacks(path)}; expected captured inputs (fp4trt calibrate --save-inputs writes them)"
        )
