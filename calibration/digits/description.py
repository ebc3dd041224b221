"""How the built-in model is sampled, calibrated and judged."""

from __future__ import annotations

from typing import Final

from calibration.pixel_space.description import Classifier, Description, Pixels, Run, Text

__all__ = ["DESCRIPTION", "WORDS"]

WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

DESCRIPTION: Final = Description(
    image=Pixels(size=16, channels=1),
    text=Text(words=8, width=64),
    steps=10,
    guidance=3.5,
    prompts=WORDS,
    calibration=tuple(Run(seed=seed, prompts=WORDS) for seed in range(4)),
    classifier=Classifier(file="classifier.safetensors", labels={word: label for label, word in enumerate(WORDS)}),
)
