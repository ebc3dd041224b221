"""GPU names: compute capability, memory, peak rates, formats with their own GEMMs, and the TensorRT for them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fp4trt.errors import UnknownGpuError, UnsupportedFormatError
from fp4trt.number_formats import BF16, FORMATS, FP8, MXFP8, NVFP4

__all__ = ["TARGETS", "Target", "parse_gpus", "require_format"]

Backend = Literal["tensorrt_rtx", "tensorrt"]


@dataclass(frozen=True)
class Target:
    """One GPU model.

    `compute_capability` is written as TensorRT-RTX does ("SM120"), `memory_gib` is the nominal memory of the
    card (unified memory on GB10), `formats` the low-precision formats that its tensor cores multiply. `bandwidth` is
    that of its memory in GB/s, the TFLOPS are peaks of its tensor cores, dense, with FP32 accumulation.
    """

    name: str
    compute_capability: str
    memory_gib: int
    backend: Backend
    formats: tuple[str, ...]
    bandwidth: int
    sixteen_bit_tflops: float
    fp4_tflops: float

    @property
    def tflops(self) -> Mapping[str, float]:
        """Name of each floating-point format that it multiplies to its peak."""
        rates = {FP8.name: 2 * self.sixteen_bit_tflops, NVFP4.name: self.fp4_tflops}
        rates[MXFP8.name] = rates[FP8.name]
        sixteen_bit = ("fp16",) if self.compute_capability == "SM75" else ("fp16", BF16)
        return dict.fromkeys(sixteen_bit, self.sixteen_bit_tflops) | {
            name: rate for name, rate in rates.items() if name in self.formats
        }

    @property
    def shares_memory(self) -> bool:
        """Whether its memory is the host's too."""
        return self.compute_capability == "SM121"


# What a compute capability multiplies, and which TensorRT builds for it. TensorRT-RTX 1.7 offers SM75, 80,
# 86, 89, 120, 121; Hopper and data-center Blackwell are left to TensorRT, which needs the GPU in the machine.
_BACKENDS: dict[str, Backend] = {
    **dict.fromkeys(("SM75", "SM80", "SM86", "SM89", "SM120", "SM121"), "tensorrt_rtx"),
    **dict.fromkeys(("SM90", "SM100", "SM103"), "tensorrt"),
}


def _formats(capability: str) -> tuple[str, ...]:
    """Return what the tensor cores multiply, the widest first."""
    return ("int8", *(name for name, kind in reversed(list(FORMATS.items())) if capability in kind.gpus))


# Each card as NAME:GiB:GB/s:TFLOPS, the last of dense tensor cores in 16 bit with FP32 accumulation (BF16; FP16 on
# SM75), and after another colon of dense FP4 where that is not eight times as much, as it is on GeForce cards.
# Sources: the appendices of NVIDIA's architecture white papers (Turing, GA102, Ada, RTX Blackwell) and its data sheets
# (T4, A10, A30, A40, A100, L4, L40, L40S, RTX PRO, H100, H200, GH200, B200, B300, GB200, GB300, DGX Spark). Where they
# give FP4 with sparsity alone ("AI TOPS": laptops, RTX PRO, GB10), dense FP4 is half of that, and 16 bit a sixteenth on
# GeForce cards and an eighth on others, as it is where both are given.
_CARDS = {
    "SM75": "rtx2060:6:336:25.8 rtx2070:8:448:29.9 rtx2080:8:448:40.3 rtx2080ti:11:616:53.8 t4:16:320:65",
    "SM80": "a30:24:933:165 a100:80:2039:312",
    "SM86": "rtx3050:8:224:18.2 rtx3060:12:360:25.5 rtx3060ti:8:448:32.4 rtx3070:8:448:40.6 rtx3070ti:8:608:43.5 "
    "rtx3080:10:760:59.5 rtx3080ti:12:912:68.2 rtx3090:24:936:71.2 rtx3090ti:24:1008:80 a10:24:600:125 "
    "a40:48:696:149.7 rtxa6000:48:768:154.8",
    "SM89": "rtx4060:8:272:30.2 rtx4060ti:8:288:44.1 rtx4070:12:504:58.3 rtx4070super:12:504:71 rtx4070ti:12:504:80.2 "
    "rtx4070tisuper:16:672:88.2 rtx4080:16:717:97.5 rtx4080super:16:736:104.4 rtx4090:24:1008:165.2 "
    "rtx4090laptop:16:576:79.4 l4:24:300:121 l40:48:864:181 l40s:48:864:362 rtx6000ada:48:960:364.2",
    "SM90": "h100:80:3350:989 h200:141:4800:989 gh200:96:4000:989",
    "SM100": "b200:180:8000:2250:9000 gb200:186:8000:2500:10000",
    "SM103": "b300:288:8000:2250:13500 gb300:288:8000:2500:15000",
    "SM120": "rtx5050:8:320:26.3 rtx5060:8:448:38.4 rtx5060ti:16:448:47.4 rtx5070:12:672:61.7 rtx5070ti:16:896:87.9 "
    "rtx5080:16:960:112.6 rtx5090:32:1792:209.5 rtx5070laptop:8:384:49.9 rtx5050laptop:8:384:27.5 "
    "rtx5060laptop:8:384:35.8 rtx5070tilaptop:12:672:62 rtx5080laptop:16:896:83.4 rtx5090laptop:24:896:114 "
    "rtxpro2000:16:288:68.1:272.5 rtxpro4000:24:672:147.3:589 rtxpro4500:32:896:210.9:843.5 "
    "rtxpro5000:48:1344:258:1032 rtxpro6000:96:1792:503.8:2015",
    "SM121": "gb10:128:273:125:500",
}

_NEAR = 0.7  # of difflib: a wrong digit or letter in a name of this length

_ALIASES = {
    "dgxspark": "gb10",
    "spark": "gb10",
    "a6000": "rtxa6000",
    "rtx6000pro": "rtxpro6000",
    "rtxpro6000blackwell": "rtxpro6000",
}


def _target(capability: str, card: str) -> Target:
    name, memory, bandwidth, sixteen_bit, *fp4 = card.split(":")
    rate, formats = float(sixteen_bit), _formats(capability)
    fp4_rate = float(fp4[0]) if fp4 else 8 * rate if NVFP4.name in formats else 0.0
    return Target(name, capability, int(memory), _BACKENDS[capability], formats, int(bandwidth), rate, fp4_rate)


_TARGETS = (_target(capability, card) for capability, cards in _CARDS.items() for card in cards.split())

TARGETS: dict[str, Target] = {target.name: target for target in _TARGETS}


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
