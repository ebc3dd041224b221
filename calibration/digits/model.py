"""Loading the built-in transformer and the numbers that were measured when it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from calibration.digits import DIRECTORY

__all__ = ["METRICS_NAME", "load_metrics", "load_transformer"]

METRICS_NAME = "metrics.json"


def load_transformer(directory: Path = DIRECTORY, dtype: torch.dtype = torch.float32) -> Any:
    """Load the BF16 weights as a diffusers ``FluxTransformer2DModel`` in eval mode.

    ``dtype`` is what they are computed in; FP32 is the reference that quantization is measured against.
    """
    from diffusers import FluxTransformer2DModel

    model: Any = FluxTransformer2DModel.from_pretrained(  # type: ignore[no-untyped-call]
        directory, torch_dtype=dtype, local_files_only=True
    )
    return model.eval()


def load_metrics(directory: Path = DIRECTORY) -> dict[str, Any]:
    """Return what the training script measured: accuracies in 0..1, counts, seeds, SHA-256 of the files."""
    metrics: dict[str, Any] = json.loads((directory / METRICS_NAME).read_text(encoding="utf-8"))
    return metrics
