"""How models are sampled that need no pipeline: as their ``sampling.json`` says; the built-in one has none."""

from __future__ import annotations

from pathlib import Path

from calibration.digits.description import DESCRIPTION
from calibration.pixel_space.description import FILE_NAME, Description, read_description
from fp4trt.families import Family
from fp4trt.families.digits import DIGITS

__all__ = ["describe"]


def describe(folder: Path, family: Family) -> Description | None:
    """Return how a plain checkpoint is sampled without a pipeline; None where it needs one.

    Args:
        folder: of the checkpoint.
        family: its family; the built-in model, of any depth, needs no file.

    Raises:
        BadCheckpoint: the file is damaged, or describes another model than the config.
    """
    if (folder / FILE_NAME).is_file():
        return read_description(folder)
    return DESCRIPTION if family is DIGITS else None
