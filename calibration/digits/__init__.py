"""The built-in model: a small FLUX transformer that draws handwritten digits, with all that judges it.

``DIRECTORY`` is itself a checkpoint in diffusers layout (``config.json`` and BF16 weights), so it stands
wherever a model's directory is asked for. The modules beside it import torch; this one does not.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["DIRECTORY"]

DIRECTORY = Path(__file__).resolve().parent
