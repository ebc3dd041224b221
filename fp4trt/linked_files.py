"""Files that are links: as in a hub's cache, where every file of a snapshot is a link to a blob."""

from __future__ import annotations

from pathlib import Path, PurePath

__all__ = ["real_file"]


def real_file(directory: Path, location: str | PurePath) -> Path | None:
    """Return the file that a location in a folder stands for, None where links lead elsewhere.

    Followed are links to what lies in the folder itself, and those of a cache of huggingface_hub, from below
    ``ROOT/snapshots`` to below ``ROOT/blobs``. Any other might read a file that is none of the model's.
    """
    folder = directory.resolve()
    place = folder / location
    real = place.resolve()
    if real.is_relative_to(folder):
        return real
    for root in place.parents:
        inside = place.relative_to(root).parts[:-1]
        if "snapshots" in inside and real.is_relative_to((root / "blobs").resolve()):
            return real
    return None
