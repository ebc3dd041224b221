"""The model that comes with the package, by the name that users type."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

__all__ = ["BUILT_IN", "path_of"]

BUILT_IN: Final = "digits"


def path_of(artifact: str | Path) -> Path:
    """Return the path that a user names, or the built-in model's folder for ``digits`` where no file has that name."""
    path = Path(artifact)
    if str(artifact) != BUILT_IN or path.exists():
        return path
    spec = importlib.util.find_spec("calibration")
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places or ["."]))) / BUILT_IN
