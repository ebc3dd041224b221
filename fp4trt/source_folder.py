"""A small folder that stands for a source that is no diffusers folder by itself: a single file, or one with LoRAs.

It holds the model's config.json and :data:`SOURCE`, which says where the weights lie and what changes them; no weights.
Every step takes it as a checkpoint of diffusers: the tensors are read, and those that need it made, from the files
themselves.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json

__all__ = ["SOURCE", "Lora", "Source", "loras_of", "source_in", "stamp_of", "stands_in"]

SOURCE: Final = "fp4trt-source.json"
"""What tells such a folder."""

_FORMAT: Final = 1


@dataclass(frozen=True)
class Lora:
    """A LoRA file that changes a source, by its absolute path, its strength and its hash."""

    path: Path
    strength: float
    sha256: str


@dataclass(frozen=True)
class Source:
    """What such a folder stands for.

    Attributes:
        weights: a single file, or the folder of a transformer.
        loras: in the order in which they are fused.
        in_place_of: the folder in a pipeline that lent the config, None where there is none.
    """

    weights: Path
    loras: tuple[Lora, ...]
    in_place_of: Path | None

    def described(self) -> dict[str, Any]:
        """Return it as JSON holds it, with what tells the files from others of their names."""
        return {
            "format": _FORMAT,
            "weights": str(self.weights),
            "identity": _identity(self.weights),
            "in_place_of": None if self.in_place_of is None else str(self.in_place_of),
            "lora": [
                {"file": str(lora.path), "strength": lora.strength, "sha256": lora.sha256, **_identity(lora.path)}
                for lora in self.loras
            ],
        }


def source_in(folder: Path) -> Source | None:
    """Return what a folder stands for, None where it is any other folder.

    Raises:
        BadCheckpoint: a file has changed since, or is gone.
    """
    if not (folder / SOURCE).is_file():
        return None
    described = load_json(folder / SOURCE)
    try:
        weights = Path(described["weights"])
        loras = tuple(Lora(Path(one["file"]), float(one["strength"]), one["sha256"]) for one in described["lora"])
        place = described["in_place_of"]
    except (KeyError, TypeError, ValueError):
        raise BadCheckpoint(f"{folder / SOURCE} is damaged; remove {folder}, and give the source again") from None
    source = Source(weights, loras, None if place is None else Path(place))
    gone = next((path for path in (weights, *(lora.path for lora in loras)) if not path.exists()), None)
    if gone is not None or source.described() != described:
        what = gone or weights
        raise BadCheckpoint(f"{what}, for which {folder} stands, has changed or is gone; give the source itself again")
    return source


def stamp_of(file: Path) -> dict[str, int]:
    """Return what tells a file from another of its name and size: when it was changed, which nobody can set back."""
    stat = file.stat()
    changed = {} if os.name == "nt" else {"changed_ns": stat.st_ctime_ns}  # there it is when it was made
    return {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns, **changed}


def loras_of(folder: Path) -> list[tuple[str, float]]:
    """Return hash and strength of the LoRAs that change what a folder stands for; none of any other folder."""
    source = source_in(folder)
    return [] if source is None else [(lora.sha256, lora.strength) for lora in source.loras]


def stands_in(folder: Path) -> Path:
    """Return the folder in a pipeline in whose place a source is taken; any other folder as it is."""
    source = source_in(folder)
    return folder if source is None or source.in_place_of is None else source.in_place_of


def _identity(path: Path) -> dict[str, int]:
    if path.is_dir():
        files = sorted((*path.glob("*.safetensors"), *path.glob("*.json")))
        return {f"{file.name} {key}": value for file in files for key, value in stamp_of(file).items()}
    return stamp_of(path)
