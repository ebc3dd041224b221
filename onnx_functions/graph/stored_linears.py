"""What `inspect` says of linears, whatever holds them: formats, coverage, and promised against found."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from fp4trt.number_formats import BF16, FORMATS, NVFP4

__all__ = ["FORMAT_OF", "UNNAMED", "StoredLinear", "compare", "coverage", "is_fp4", "is_quantized"]

FORMAT_OF: Final[Mapping[str, str]] = {
    **{
        name: kind.name
        for kind in reversed(list(FORMATS.values()))
        for name in (kind.codes, kind.onnx_codes, kind.title)
    },
    "BF16": BF16,
    "BFLOAT16": BF16,
    "F16": "fp16",
    "FLOAT16": "fp16",
    "F32": "fp32",
    "FLOAT": "fp32",
}
"""Format by the name of the stored type, that of safetensors, of ONNX and of an engine's GEMMs.

Of several formats with one type of codes it is the first: their other tensors tell them apart.
"""


UNNAMED: Final = "unknown"
"""What a linear of an engine is computed in whose kernel the build's log does not name."""


@dataclass(frozen=True)
class StoredLinear:
    """A linear layer: `shape` is [N, K] in elements, `nbytes` the weight with its scales; None where unknown."""

    path: str
    format: str
    shape: tuple[int, int] | None
    nbytes: int | None


def is_fp4(kind: str) -> bool:
    """Return whether a format stores its weights in FP4."""
    return kind.startswith((NVFP4.name, "fp4"))


def is_quantized(kind: str) -> bool:
    """Return whether a format stores its weights quantized."""
    return kind.startswith(("fp4", *FORMATS))


def coverage(linears: Sequence[StoredLinear], groups: Iterable[Sequence[str]]) -> dict[str, Any]:
    """Return formats, FP4 coverage, groups of more than one, and the linears themselves, as JSON holds them.

    `group_count` counts the groups of one linear too, as the manifest of a checkpoint has them.
    """
    groups = [list(group) for group in groups]
    formats: dict[str, dict[str, int]] = {}
    for linear in linears:
        entry = formats.setdefault(linear.format, {"linears": 0, "parameters": 0, "bytes": 0})
        entry["linears"] += 1
        entry["parameters"] += math.prod(linear.shape or (0,))
        entry["bytes"] += linear.nbytes or 0
    total = sum(entry["parameters"] for entry in formats.values())
    fp4 = [entry for kind, entry in formats.items() if is_fp4(kind)]
    return {
        "formats": formats,
        "fp4_linears": sum(entry["linears"] for entry in fp4),
        "fp4_coverage": sum(entry["parameters"] for entry in fp4) / total if total else 0.0,
        "group_count": len(groups),
        "groups": [group for group in groups if len(group) > 1],
        "linears": [{**asdict(linear), "shape": linear.shape and list(linear.shape)} for linear in linears],
    }


def compare(
    promised: Mapping[str, Sequence[str]], found: Mapping[str, str], reasons: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Hold what an artifact promises of its linears against what was found.

    Args:
        promised: format to module paths. A linear that no format names may be anything but FP4 and FP8, unless formats
            of 16 bit are promised too: then it should not be there.
        found: module path to format.
        reasons: why a linear is not what it was to be, where that is known.

    Returns:
        `promised` and `found` as format to count, and `differing`: path, promised and found format (None where the
        one or the other has no such linear), and the reason where one is known.
    """
    wanted = {path: kind for kind, paths in promised.items() for path in paths}
    whole = any(not is_quantized(kind) for kind in promised)
    unnamed = [path for path, kind in found.items() if path not in wanted and (whole or is_quantized(kind))]
    differing = [
        {"path": path, "promised": wanted.get(path), "found": found.get(path)}
        | ({"reason": reasons[path]} if reasons and path in reasons else {})
        for path in (*wanted, *unnamed)
        if wanted.get(path) != found.get(path)
    ]
    counts: dict[str, int] = {}
    for kind in found.values():
        counts[kind] = counts.get(kind, 0) + 1
    return {
        "promised": {kind: len(paths) for kind, paths in promised.items() if paths},
        "found": counts,
        "differing": differing,
    }
