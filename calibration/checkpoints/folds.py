"""Which linears a checkpoint's method has given other channels than the model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibration.checkpoints.quantized import Checkpoint

__all__ = ["folded_linears"]


def folded_linears(checkpoint: Checkpoint) -> set[str]:
    """Return the linears whose inputs, or outputs, the method ``quality`` has shifted or scaled.

    The model is the same as a whole, but a LoRA no longer fits such a linear, and the shifts and scales are not stored.
    """
    manifest = checkpoint.manifest
    method = _object(_object(_object(manifest, "training"), "start") or _object(manifest, "recipe"), "method")
    if method.get("name") != "quality" or not (method.get("shift_fold") or method.get("smooth_fold")):
        return set()
    family, config = checkpoint.family, checkpoint.config
    return {
        f"{block}.{path}"
        for block in family.blocks(config)
        for place in family.modulated(config, block)
        for path in (place.modulation, *place.consumers)
    }


def _object(of: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return an object that a manifest holds, an empty one where it holds none."""
    value = of.get(key)
    return value if isinstance(value, dict) else {}
