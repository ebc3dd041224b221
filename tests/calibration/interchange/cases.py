"""Which checkpoint goes to which reader in which layout, and what becomes of it: tests run these, the table shows them.

``python -m tests.calibration.interchange.cases`` writes the table into docs/interchange.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fp4trt

__all__ = ["CASES", "GUIDE", "Case", "table", "written_into"]

GUIDE: Final = Path(fp4trt.__file__).parents[1] / "docs" / "interchange.md"
BEGIN, END = "<!-- table of conversions -->\n", "<!-- end of the table of conversions -->\n"

EXACT: Final = "exact"
LOSSY: Final = "lossy"
REFUSED: Final = "refused"

COMFYUI: Final = "ComfyUI (comfy-kitchen)"
DIFFUSERS: Final = "diffusers' BFL loader"
TORCHAO: Final = "torchao's NVFP4Tensor"
BFL: Final = "diffusers' BFL quantizer"
FP4TRT: Final = "fp4trt"
FROM_BFL: Final = "fp4trt, --from bfl"
BACK: Final = "fp4trt again"


@dataclass(frozen=True)
class Case:
    """A conversion.

    Attributes:
        producer: who wrote the checkpoint.
        checkpoint: what it is; the tests make each of these.
        to: the layout that it is converted to.
        reader: of the result.
        result: ``exact``, ``lossy`` or ``refused``.
        words: what is lost, or a part of the refusal.
        said: what ``--from`` says.
        calibrated: whether ``--calibration`` is given.
    """

    producer: str
    checkpoint: str
    to: str
    reader: str
    result: str = EXACT
    words: str = ""
    said: str | None = None
    calibrated: bool = False

    @property
    def direction(self) -> str:
        """Whether it leads out of fp4trt or into it."""
        return "in" if self.producer not in ("fp4trt", "ModelOpt") else "out"

    def __str__(self) -> str:
        """Return its name in a run of the tests."""
        return f"{self.checkpoint} of {self.producer} to {self.to} for {self.reader}"


def _refused(producer: str, checkpoint: str, to: str, words: str, reader: str = "", said: str | None = None) -> Case:
    named = {"comfyui": COMFYUI, "bfl": DIFFUSERS, "diffusers": DIFFUSERS, "modelopt": FP4TRT}
    return Case(producer, checkpoint, to, reader or named[to], REFUSED, words, said)


OURS: Final = (
    "NVFP4 (nvfp4-ptq)",
    "NVFP4 (nvfp4-quality)",
    "NVFP4, modulations in FP8",
)
MIXED: Final = "NVFP4, FP8 and MXFP8"
SVDQUANT: Final = "SVDQuant (svdquant-r8)"
FP8: Final = "all in FP8 (fp8-ptq)"
ATTENTION: Final = "NVFP4, attention in FP8"
FLUX2: Final = "FLUX.2 in NVFP4"
UNSHARED: Final = "NVFP4, q and k with a scale each"
UNSHARED_FP8: Final = "FP8, q and k with a scale each"
EMBEDDER: Final = "NVFP4, embedders too"

CASES: Final[tuple[Case, ...]] = (
    *(Case("fp4trt", name, to, reader) for name in OURS for to, reader in (("comfyui", COMFYUI), ("comfyui", BACK))),
    *(Case("fp4trt", name, to, BACK) for name in OURS for to in ("bfl", "diffusers", "modelopt")),
    *(Case("fp4trt", name, "diffusers", DIFFUSERS) for name in OURS),
    Case(
        "fp4trt", OURS[0], "comfyui", f"{COMFYUI} in BF16", LOSSY, "block scale times global scale is rounded to BF16"
    ),
    Case("fp4trt", OURS[0], "diffusers", TORCHAO),
    Case("fp4trt", FLUX2, "bfl", DIFFUSERS),
    Case("fp4trt", FLUX2, "comfyui", BACK),
    Case("fp4trt", MIXED, "comfyui", COMFYUI),
    Case("fp4trt", MIXED, "comfyui", BACK),
    _refused("fp4trt", MIXED, "bfl", "in MXFP8; diffusers' BFL loader knows NVFP4 and FP8 alone"),
    _refused("fp4trt", MIXED, "diffusers", "in MXFP8; diffusers' BFL loader knows NVFP4 and FP8 alone"),
    Case("fp4trt", SVDQUANT, "comfyui", f"{COMFYUI}, branch as a bypass"),
    Case("fp4trt", SVDQUANT, "comfyui", BACK),
    _refused("fp4trt", SVDQUANT, "bfl", "diffusers' BFL loader knows neither SVDQuant nor AWQ"),
    _refused("fp4trt", SVDQUANT, "diffusers", "diffusers' BFL loader knows neither SVDQuant nor AWQ"),
    Case("fp4trt", FP8, "comfyui", COMFYUI),
    Case("fp4trt", FP8, "bfl", BACK),
    Case("fp4trt", FP8, "diffusers", DIFFUSERS),
    _refused("fp4trt", ATTENTION, "comfyui", "has attention in FP8, transformer_blocks.0.attn first"),
    _refused("fp4trt", ATTENTION, "bfl", "has attention in FP8"),
    _refused("fp4trt", ATTENTION, "diffusers", "has attention in FP8"),
    Case("fp4trt", ATTENTION, "modelopt", BACK),
    _refused("ModelOpt", UNSHARED, "comfyui", "each has its own weight_scale_2"),
    _refused("ModelOpt", UNSHARED, "bfl", "each has its own weight_scale_2"),
    Case("ModelOpt", UNSHARED, "diffusers", DIFFUSERS),
    _refused("ModelOpt", UNSHARED_FP8, "comfyui", "each has its own weight_scale; expected one"),
    Case("ModelOpt", UNSHARED_FP8, "bfl", f"{FP4TRT}, weights alone"),
    _refused("ModelOpt", EMBEDDER, "comfyui", "ComfyUI reads the model's sizes from img_in.weight; expected 16 bit"),
    Case("ModelOpt", EMBEDDER, "diffusers", DIFFUSERS),
    Case("ComfyUI, BFL", "NVFP4, marked by tensors", "modelopt", FP4TRT),
    Case("ComfyUI, BFL", "NVFP4, marked in the header, with a prefix", "modelopt", FP4TRT),
    Case("ComfyUI, BFL", MIXED, "modelopt", FP4TRT),
    Case(
        "ComfyUI, BFL",
        "NVFP4, marked as multiplied in 16 bit",
        "modelopt",
        FP4TRT,
        LOSSY,
        "inputs are quantized, which ComfyUI leaves in 16 bit",
    ),
    _refused("ComfyUI, BFL", "NVFP4 without input_scale", "modelopt", "give --calibration amax.json"),
    Case("ComfyUI, BFL", "NVFP4 without input_scale", "modelopt", f"{FP4TRT}, --calibration", calibrated=True),
    _refused(
        "ComfyUI, BFL", "NVFP4 without a mark", "modelopt", "by --from comfyui (tiles, high nibble first) or --from"
    ),
    Case("ComfyUI, BFL", "NVFP4 without a mark", "modelopt", f"{FP4TRT}, --from comfyui", said="comfyui"),
    Case(BFL, "NVFP4 in BFL's names", "modelopt", FROM_BFL, said="bfl"),
    _refused(BFL, "FP8 with a scale a row", "modelopt", "one scale for the whole", FROM_BFL, "bfl"),
    _refused("ComfyUI, BFL", "INT8", "modelopt", "is in the layout of INT8"),
    _refused("ComfyUI, BFL", "scaled FP8 of before", "modelopt", "is in the layout of ComfyUI's scaled FP8"),
    _refused("nunchaku", "SVDQuant", "modelopt", "is in the layout of nunchaku's SVDQuant"),
    _refused("LightX2V", "NVFP4", "modelopt", "its global scales are reciprocals"),
)


def table() -> str:
    """Return the cases as a table in Markdown."""
    lines = ["| | producer | checkpoint | `--to` | reader | result |", "|---|---|---|---|---|---|"]
    for case in CASES:
        words = f" ({case.words})" if case.result == LOSSY else ""
        named = case.checkpoint, f"`{case.to}`", case.reader, f"{case.result}{words}"
        lines.append(f"| {case.direction} | {case.producer} | {' | '.join(named)} |")
    return "\n".join(lines) + "\n"


def written_into(guide: str) -> str:
    """Return the guide with the table in its place."""
    before, _, rest = guide.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    GUIDE.write_text(written_into(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
