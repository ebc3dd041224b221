"""The value of the option ``--lora``: a file and the strength at which it is fused."""

from __future__ import annotations

import math
from pathlib import Path

from fp4trt.errors import BadOption

__all__ = ["parse_lora"]


def parse_lora(text: str) -> tuple[Path, float]:
    """Return the file and the strength that ``FILE[:STRENGTH]`` means; the strength is 1 where none is given.

    A colon that no number follows belongs to the file's name, as in ``C:\\LoRA\\style.safetensors``, and so does every
    colon of a file that is there.

    Raises:
        BadOption: there is no name, or the strength is no finite number.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).is_file():
        name, number = text, "1"
    try:
        strength = float(number)
    except ValueError:
        if Path(name).is_file():
            raise BadOption(
                f"--lora {text}: the strength {number!r} is no number; expected such as {name}:0.8"
            ) from None
        name, strength = text, 1.0
    if not name or not math.isfinite(strength):
        raise BadOption(f"--lora {text}: expected FILE or FILE:STRENGTH, such as style.safetensors:0.8")
    return Path(name), strength
