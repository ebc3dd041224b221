"""The folder of a whole pipeline in place of its transformer's: ``transformer/`` is looked into."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fp4trt.errors import BadCheckpoint

__all__ = ["PIPELINE", "component_folder", "graph_in", "index_of", "transformer_folder"]

PIPELINE: Final = "model_index.json"
"""What tells the folder of a whole pipeline."""

_MODULAR: Final = "modular_model_index.json"
"""What tells that of one that diffusers puts together from blocks, as FLUX.3's is."""

_MODEL: Final = "model.onnx"


def index_of(folder: Path) -> Path | None:
    """Return the file that names a pipeline's class and parts; None of a folder that is no pipeline's."""
    return next((folder / name for name in (PIPELINE, _MODULAR) if (folder / name).is_file()), None)


def component_folder(folder: Path, name: str) -> Path:
    """Return the folder of a part of a pipeline, such as ``vae`` or ``text_encoder_2``.

    Raises:
        BadCheckpoint: the folder is no pipeline's, or the pipeline has no such part.
    """
    if not folder.is_dir() or index_of(folder) is None:
        raise BadCheckpoint(
            f"{folder} is no folder of a whole pipeline ({PIPELINE}), of which {name} could be a part; expected one, "
            "such as save_pretrained writes"
        )
    if Path(name).name != name or not (folder / name / "config.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise BadCheckpoint(
            f"{folder} has no {name}/ with a config.json; expected one of: {', '.join(parts) or 'nothing that it has'}"
        )
    return folder / name


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
    if (index := index_of(folder)) is not None:
        if inner.is_dir():
            return inner
        if (folder / "unet").is_dir():
            raise BadCheckpoint(f"{folder} is a pipeline around a UNet (unet/); expected one around a transformer")
        if not (folder / "config.json").is_file():
            parts = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise BadCheckpoint(
                f"{folder} is a pipeline ({index.name}) without transformer/; "
                f"it has {', '.join(parts) or 'no folder'}: take one with its transformer"
            )
    elif not (folder / "config.json").is_file() and inner.is_dir():
        return inner
    return folder
