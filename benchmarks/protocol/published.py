"""What deepcompressor publishes of FLUX.1-dev, and in what a run here is like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from protocol.drawing import Settings
from protocol.prompts import Choice

SOURCE = "https://github.com/nunchaku-tech/deepcompressor, examples/diffusion/README.md"
COUNT = 5000
THEIRS = Settings(steps=50, guidance=3.5, resolution=1024, text_tokens=512)


@dataclass(frozen=True)
class Row:
    """A line of their table; None where they give no number."""

    method: str
    lpips: float | None
    psnr_db: float | None
    image_reward: float
    fid: float


TABLE = (
    Row("BF16", None, None, 0.953, 20.3),
    Row("NVFP4, round to nearest", 0.242, 20.4, 0.926, 20.3),
    Row("NVFP4, SVDQuant", 0.224, 20.8, 0.944, 20.3),
    Row("NVFP4, SVDQuant + GPTQ", 0.203, 21.5, 0.945, 20.3),
)


@dataclass(frozen=True)
class Likeness:
    """One thing that decides about the numbers.

    Attributes:
        what: it is.
        theirs: as their public code and table have it.
        ours: as this run has it.
        alike: whether that is the same; None where one cannot say.
    """

    what: str
    theirs: str
    ours: str
    alike: bool | None


def likenesses(choice: Choice, settings: Settings, calibrated_on: str) -> list[Likeness]:
    """Return in what a run is like the published one.

    Args:
        choice: the prompts.
        settings: of the images.
        calibrated_on: what the recipes were calibrated on, in words.
    """
    theirs, ours = THEIRS.as_dict(), settings.as_dict()
    names = {
        "steps": "denoising steps",
        "guidance": "guidance",
        "resolution": "pixels of a side",
        "text_tokens": "length of T5's input, in tokens",
    }
    count, of = len(choice.asked), "MJHQ-30K" if choice.is_mjhq else choice.file
    return [
        Likeness("prompts", f"{COUNT} of MJHQ-30K", f"{count} of {of}", choice.is_mjhq and count == COUNT),
        Likeness(
            "choice of the prompts",
            "the first of the names shuffled by random.Random(0)",
            "the same" if choice.is_mjhq else f"the same of the lines of {choice.file}",
            choice.is_mjhq,
        ),
        Likeness(
            "noise",
            "seed from the name in meta_data.json, drawn on the CPU",
            "the same" if choice.is_mjhq else "seed from the prompt, drawn on the CPU",
            choice.is_mjhq,
        ),
        *(Likeness(name, str(theirs[key]), str(ours[key]), theirs[key] == ours[key]) for key, name in names.items()),
        Likeness("PSNR", "torchmetrics, mean over images, 8 bits, to the BF16 images", "the same formula", True),
        Likeness("LPIPS", "torchmetrics, AlexNet, to the BF16 images", "the same", True),
        Likeness("ImageReward", "ImageReward-v1.0, mean over images", "the same", True),
        Likeness(
            "FID",
            "clean-fid, to the pictures of MJHQ-30K",
            "Inception of torch-fidelity, to the BF16 images: another number",
            False,
        ),
        Likeness("calibration", "128 prompts of COCO Captions", calibrated_on, False),
        Likeness(
            "what is quantized, and how it is computed",
            "adaptive norms' linears in INT4 with 16-bit inputs, their own fake quantization",
            "as each checkpoint says (fp4trt inspect), fake quantization as ModelOpt's in BF16",
            False,
        ),
        Likeness("BF16 images", "drawn on their machine", "drawn on this one", None),
    ]


def as_json(found: Sequence[Likeness]) -> dict[str, Any]:
    """Return table and likenesses as JSON."""
    return {
        "source": SOURCE,
        "prompts": COUNT,
        "rows": [asdict(row) for row in TABLE],
        "alike": [asdict(one) for one in found],
    }
