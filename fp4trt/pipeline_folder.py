"""The folder of a whole pipeline in place of its transformer's: ``transformer/`` is looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fp4trt.errors import BadCheckpoint

__all__ = ["PIPELINE", "graph_in", "transformer_folder"]

PIPELINE: Final = "model_index.json"
"""What tells the folder of a whole pipeline."""

_MODEL: Final = "model.onnx"


def graph_in(path: Path) -> Path:
    """Return the ONNX file that a user names: the file itself, or ``model.onnx`` in a folder or in a pipeline's.

    Raises:
        BadCheckpoint: the folder is a pipeline's without a transformer.
    """
    if not path.is_dir():
        return path
    return path / _MODEL if (path / _MODEL).is_file() else transformer_folder(path) / _MODEL


def transformer_folder(folder: Path) -> Path:
    """Return the folder of the transformer of a pipeline's; any other folder as it is.

    Raises:
        BadCheckpoint: it is a pipeline's and has none.
    """
    inner = folder / "transformer"
    if (folder / PIPELINE).is_file():
        if inner.is_dir():
            return inner
        if (folder / "unet").is_dir():
            raise BadCheckpoint(f"{folder} is a pipeline around a UNet (unet/); expected one around a transformer")
        if not (folder / "config.json").is_file():
            parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise BadCheckpoint(
                f"{folder} is a pipeline ({PIPELINE}) without transformer/; it has {', '.join(parts) or 'no folder'}: "
                "take one with its transformer"
            )
    elif not (folder / "config.json").is_file() and inner.is_dir():
        return inner
    return folder
