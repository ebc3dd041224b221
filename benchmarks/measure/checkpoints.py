"""Synthetic FLUX.1 checkpoints of a size that is written as in `19+38x24`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from measure.child import ROOT, fp4trt, run

SYNTHETIC = ROOT / "benchmarks" / "synthetic" / "flux.py"


@dataclass(frozen=True)
class Size:
    """Depth and width of a FLUX.1 transformer.

    Attributes:
        double: blocks of text and image apart.
        single: blocks of both together.
        heads: of attention, 128 wide each; FLUX.1 has 24.
    """

    double: int
    single: int
    heads: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Return the size that `DOUBLE+SINGLExHEADS` says; `xHEADS` may be left out."""
        blocks, _, heads = text.partition("x")
        double, _, single = blocks.partition("+")
        return cls(int(double), int(single), int(heads or 24))

    def __str__(self) -> str:
        return f"{self.double}+{self.single}x{self.heads}"


def plain(folder: Path, size: Size) -> tuple[Path, Path]:
    """Write a BF16 checkpoint below a folder; return it and the file of its maxima."""
    source = _written(folder, size)
    return source, source.parent / "amax.json"


def plain_with_inputs(folder: Path, size: Size, calls: int, tokens: str) -> tuple[Path, Path]:
    """Write a BF16 checkpoint below a folder; return it and a file of captured inputs, `tokens` being IMAGE,TEXT."""
    source = _written(folder, size, "--calls", str(calls), "--tokens", tokens)
    return source, source.parent / "inputs.safetensors"


def _written(folder: Path, size: Size, *words: str) -> Path:
    print(f"writing {size}", file=sys.stderr)
    source = folder / str(size) / "flux"
    depth = ["--double", str(size.double), "--single", str(size.single), "--heads", str(size.heads)]
    run([sys.executable, str(SYNTHETIC), str(source), *depth, *words])
    return source


def quantized(folder: Path, size: Size) -> Path:
    """Write a quantized checkpoint below a folder and return it; the plain one is not kept."""
    source, amax = plain(folder, size)
    result = source.parent / "flux-fp4"
    fp4trt("quantize", source, "-o", result, "--calibration", amax)
    shutil.rmtree(source)
    return result


def exported(folder: Path, size: str) -> Path:
    """Write a quantized checkpoint with its graph below a folder and return it; `digits` is the built-in model."""
    if size == "digits":
        result = folder / size
        fp4trt("quantize", size, "-o", result, "--recipe", "nvfp4-ptq")
    else:
        result = quantized(folder, Size.parse(size))
    fp4trt("export", result)
    return result


def tensor_files(checkpoint: Path) -> list[Path]:
    """Return the files of its tensors."""
    return sorted(checkpoint.glob("*.safetensors"))


def tensor_bytes(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in tensor_files(checkpoint))
