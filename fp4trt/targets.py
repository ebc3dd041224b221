"""GPU names: compute capability, memory, formats with their own GEMMs, and the TensorRT that serves them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fp4trt.errors import UnknownGpuError, UnsupportedFormatError
from fp4trt.number_formats import FORMATS, FP8

__all__ = ["TARGETS", "Target", "parse_gpus", "require_format"]

Backend = Literal["tensorrt_rtx", "tensorrt"]


@dataclass(frozen=True)
class Target:
    """One GPU model.

    `compute_capability` is written as TensorRT-RTX does ("SM120"), `memory_gib` is the nominal memory of the
    card (unified memory on GB10), `formats` the low-precision formats that its tensor cores multiply.
    """

    name: str
    compute_capability: str
    memory_gib: int
    backend: Backend
    formats: tuple[str, ...]


# What a compute capability multiplies, and which TensorRT builds for it. TensorRT-RTX 1.7 offers SM75, 80,
# 86, 89, 120, 121; Hopper and data-center Blackwell are left to TensorRT, which needs the GPU in the machine.
_BACKENDS: dict[str, Backend] = {
    **dict.fromkeys(("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"), "tensorrt_rtx"),
    **dict.fromkeys(("SM90", "SM100", "SM103"), "tensorrt"),
}


def _formats(capability: str) -> tuple[str, ...]:
    """Return what the tensor cores multiply, the widest first."""
    return ("int8", *(name for name, kind in reversed(list(FORMATS.items())) if capability in kind.gpus))


# Cards and their nominal memory in GiB.
_CARDS = {
    "SM75": "rtx2060:6 rtx2070:8 rtx2080:8 rtx2080ti:11 t4:16",
    "SM80": "a30:24 a100:80",
    "SM86": "rtx3050:8 rtx3060:12 rtx3060ti:8 rtx3070:8 rtx3070ti:8 rtx3080:10 rtx3080ti:12 rtx3090:24 "
    "rtx3090ti:24 a10:24 a40:48 rtxa6000:48",
    "SM89": "rtx4060:8 rtx4060ti:8 rtx4070:12 rtx4070super:12 rtx4070ti:12 rtx4070tisuper:16 rtx4080:16 "
    "rtx4080super:16 rtx4090:24 rtx4090laptop:16 l4:24 l40:48 l40s:48 rtx6000ada:48",
    "SM90": "h100:80 h200:141 gh200:96",
    "SM100": "b200:180 gb200:186",
    "SM103": "b300:288 gb300:288",
    "SM120": "rtx5050:8 rtx5060:8 rtx5060ti:16 rtx5070:12 rtx5070ti:16 rtx5080:16 rtx5090:32 rtx5070laptop:8 "
    "rtx5050laptop:8 rtx5060laptop:8 "
    "rtx5070tilaptop:12 rtx5080laptop:16 rtx5090laptop:24 rtxpro2000:16 rtxpro4000:24 rtxpro4500:32 "
    "rtxpro5000:48 rtxpro6000:96",
    "SM121": "gb10:128",
}

_NEAR = 0.7  # of difflib: a wrong digit or letter in a name of this length

_ALIASES = {
    "dgxspark": "gb10",
    "spark": "gb10",
    "a6000": "rtxa6000",
    "rtx6000pro": "rtxpro6000",
    "rtxpro6000blackwell": "rtxpro6000",
}

TARGETS: dict[str, Target] = {
    name: Target(name, capability, int(memory), _BACKENDS[capability], _formats(capability))
    for capability, cards in _CARDS.items()
    for name, _, memory in (card.partition(":") for card in cards.split())
}


def parse_gpus(text: str) -> tuple[Target, ...]:
    """Return the targets that a comma-separated list names, without duplicates.

    Spelling is free: "RTX 5090", "NVIDIA GeForce RTX 5090" and "rtx-5090" are one GPU, "dgx-spark" is "gb10".

    Raises:
        UnknownGpuError: a name that no target has (near ones are listed, else all), or targets that one engine
            cannot serve together.
    """
    targets = tuple(dict.fromkeys(_find(name) for name in text.split(",")))
    if len({target.backend for target in targets}) > 1:
        parts = ", ".join(f"{target.name} ({target.backend})" for target in targets)
        raise UnknownGpuError(f"no one TensorRT builds for all of {parts}; build once for each backend")
    if len(targets) > 1 and targets[0].backend == "tensorrt":
        names = ", ".join(target.name for target in targets)
        raise UnknownGpuError(f"TensorRT builds for the one GPU in the machine, got {names}; name one")
    return targets


def require_format(targets: Sequence[Target], number_format: str) -> None:
    """Raise UnsupportedFormatError unless every target computes in `number_format`."""
    lacking = [target for target in targets if number_format not in target.formats]
    if lacking:
        names = ", ".join(f"{target.name} ({target.compute_capability})" for target in lacking)
        able = ", ".join(sorted(FORMATS[number_format].gpus, key=lambda name: int(name.removeprefix("SM"))))
        others = [kind for kind in FORMATS if all(kind in target.formats for target in targets)]
        advice = f", or quantize by {others[0]}-ptq or {others[0]}-quality" if FP8.name in others[:1] else ""
        raise UnsupportedFormatError(
            f"the graph is {number_format.upper()}, which {names} cannot compute; choose a GPU of {able}{advice}"
        )


def _find(name: str) -> Target:
    key = re.sub(r"[\s_-]+|nvidia|geforce", "", name.lower())
    key = _ALIASES.get(key, key)
    if key in TARGETS:
        return TARGETS[key]
    near = difflib.get_close_matches(key, [*TARGETS, *_ALIASES], n=4, cutoff=_NEAR)
    names = list(dict.fromkeys(_ALIASES.get(match, match) for match in near))
    advice = f"did you mean {', '.join(names)}?" if names else f"known are {', '.join(TARGETS)}"
    raise UnknownGpuError(f"unknown GPU {name.strip()!r}; {advice}")
