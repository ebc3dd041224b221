"""What can be said of a checkpoint's images and velocities beside the reference's: each metric as one entry."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from generation.comparison.drawing import Drawn
from generation.comparison.frechet import FEWEST, frechet_scores
from generation.comparison.statistics import Scores, jackknife, scores_of

__all__ = [
    "PSNR",
    "SSIM",
    "UNUSABLE",
    "VELOCITY",
    "Metric",
    "Shown",
    "frechet",
    "has_ssim",
    "lacking",
    "likeness",
    "per_image",
    "psnr_db",
    "recognised",
    "velocity_at",
    "why_no_ssim",
]

# An MSE below this counts as this much: two equal images have 120 dB, and a mean over images stays finite.
_SMALLEST_MSE: Final = 1e-12

NO_SSIM: Final = "a package is not installed: pip install 'fp4trt[metrics]'"

UNUSABLE: Final = (ImportError, OSError, RuntimeError)
"""What importing a package may raise, torchvision's build for another torch a RuntimeError; and loading weights."""

_AT_ONCE: Final = 8
"""Images whose SSIM is computed together: those of a pipeline are large."""


@dataclass(frozen=True, eq=False)
class Shown:
    """What one model drew of all seeds, read a seed at a time.

    Attributes:
        seeds: in the order of all scores.
        prompts: of the images of each seed.
        images: seed to its images in parts, in order, each FP32 in [0, 1], [N, H, W] or [N, 3, H, W]: only one part
            has to be in memory. The parts of what is compared are equally large.
        drawn: seed to what was measured on the reference's way; None for the reference itself.
    """

    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    images: Callable[[int], Iterable[torch.Tensor]]
    drawn: Callable[[int], Drawn] | None = None


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        key: its name in compare.json.
        title: for people.
        form: how its number is written, a format specification.
        unit: behind the number.
        higher_is_better: of two checkpoints.
        meaning: one sentence for a reader who does not know it.
        scores: (what a checkpoint drew, what the reference drew) to its scores.
        absolute: whether it says something of the reference alone.
        least: images of each seed that it needs.
    """

    key: str
    title: str
    form: str
    unit: str
    higher_is_better: bool
    meaning: str
    scores: Callable[[Shown, Shown], Scores]
    absolute: bool = False
    least: int = 1


def psnr_db(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return each image's peak signal-to-noise ratio in dB, FP64 [B]; both [B, ...] in [0, 1]."""
    mse = (images.double() - references.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(mse.clamp_min(_SMALLEST_MSE))


def _ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity: Any = structural_similarity_index_measure
    one, other = (each.unsqueeze(1) if each.ndim == 3 else each for each in (images, references))
    parts = zip(one.split(_AT_ONCE), other.split(_AT_ONCE), strict=True)
    return torch.cat([similarity(*part, data_range=1.0, reduction="none").reshape(-1) for part in parts])


def per_image(
    measure: Callable[[torch.Tensor, torch.Tensor, tuple[str, ...]], torch.Tensor],
) -> Callable[[Shown, Shown], Scores]:
    """Return the scores of what gives a value for each of some images: (images, references, prompts) to [N]."""

    def of_seed(shown: Shown, reference: Shown, seed: int) -> torch.Tensor:
        asked = iter(shown.prompts)
        parts = zip(shown.images(seed), reference.images(seed), strict=True)
        found = [measure(one, other, tuple(itertools.islice(asked, len(one)))) for one, other in parts]
        return torch.cat([part.double().cpu() for part in found])

    def scores(shown: Shown, reference: Shown) -> Scores:
        return scores_of(torch.stack([of_seed(shown, reference, seed) for seed in shown.seeds]).numpy())

    return scores


def _velocity(shown: Shown, _: Shown) -> Scores:
    return velocity_at(shown, None)


def velocity_at(shown: Shown, call: int | None) -> Scores:
    """Return the scores of the velocity's relative L2 error at one call of the schedule; None: over all of them."""
    assert shown.drawn is not None
    chosen = slice(None) if call is None else slice(call, call + 1)
    drawn = [shown.drawn(seed) for seed in shown.seeds]
    errors = [one.squared_error[:, chosen].sum(1).numpy() for one in drawn]
    norms = [one.squared_norm[:, chosen].sum(1).numpy() for one in drawn]
    return jackknife(
        [len(one) for one in errors],
        lambda seed, kept: float(np.sqrt(errors[seed][kept].sum() / norms[seed][kept].sum())),
    )


PSNR: Final = Metric(
    "psnr_db", "image PSNR", ".2f", "dB", True,
    "Mean of the images' peak signal-to-noise ratio against the reference's image of the same prompt and noise.",
    per_image(lambda images, references, _: psnr_db(images, references)),
)  # fmt: skip
SSIM: Final = Metric(
    "ssim", "SSIM", ".4f", "", True,
    "Structural similarity with the reference's image (Wang et al. 2004; torchmetrics, Gaussian window of 11 pixels).",
    per_image(lambda images, references, _: _ssim(images, references)),
)  # fmt: skip
VELOCITY: Final = Metric(
    "velocity_error", "velocity error", ".4f", "", False,
    "Relative L2 error of the transformer's answer at every state that the reference itself passed through.",
    _velocity,
)  # fmt: skip


def likeness() -> tuple[list[Metric], dict[str, str]]:
    """Return what says how like the reference's an image is, PSNR and SSIM, and what of it cannot be had and why."""
    no_ssim = why_no_ssim()
    return ([PSNR, SSIM], {}) if no_ssim is None else ([PSNR], {SSIM.title: no_ssim})


def has_ssim() -> bool:
    """Whether the package that computes the SSIM can be imported."""
    return why_no_ssim() is None


def why_no_ssim() -> str | None:
    """Return what the SSIM lacks, its package or one that this imports; None where it can be computed."""
    if importlib.util.find_spec("torchmetrics") is None:
        return NO_SSIM
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: F401
    except UNUSABLE as error:
        return lacking(error)
    return None


def lacking(error: Exception) -> str:
    """Return, in one line, what an installed package does not find when it is imported or loads its weights."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"a package is not installed: pip install {error.name.partition('.')[0]}"
    what = "a package cannot be imported" if isinstance(error, ImportError) else "it cannot be loaded here"
    return f"{what}: {' '.join(str(error).split())}"


def frechet(key: str, title: str, features: Callable[[torch.Tensor], torch.Tensor], network: str) -> Metric:
    """Return the Frechet distance to the reference's images of the same seeds, in the features [N, D] of a network."""

    @functools.cache
    def of(shown: Shown, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return torch.cat([features(part).double().cpu() for part in shown.images(seed)]).numpy()

    def scores(shown: Shown, reference: Shown) -> Scores:
        return frechet_scores(
            [of(shown, seed) for seed in shown.seeds], [of(reference, seed) for seed in reference.seeds]
        )

    meaning = f"Frechet distance to the reference's images of the same prompts and noise, in the features of {network}."
    return Metric(key, title, ".4f", "", False, meaning, scores, least=FEWEST)


def recognised(classifier: nn.Module, label_of: Callable[[str], int], title: str, judge: str) -> Metric:
    """Return the fraction of images that a classifier reads as their prompt.

    Args:
        classifier: of images.
        label_of: prompt to label.
        title: of the metric.
        judge: who reads what, as it follows on "images that".
    """
    from generation.comparison.digit_classifier import predict

    def right(images: torch.Tensor, _: torch.Tensor, prompts: tuple[str, ...]) -> torch.Tensor:
        return predict(classifier, images) == torch.tensor([label_of(prompt) for prompt in prompts])

    meaning = f"Fraction of the images that {judge}."
    return Metric("recognised", title, ".2%", "", True, meaning, per_image(right), absolute=True)
