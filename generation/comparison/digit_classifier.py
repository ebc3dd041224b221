"""The judge of the built-in model: a small CNN trained on real digits only."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from calibration.digits import DIRECTORY

__all__ = ["FILE_NAME", "accuracy", "build_classifier", "load_classifier", "predict"]

FILE_NAME = "classifier.safetensors"


def build_classifier() -> nn.Sequential:
    """Return the untrained classifier: images FP32 [B, 1, 16, 16] in [0, 1] -> logits [B, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def load_classifier(directory: Path = DIRECTORY) -> nn.Sequential:
    """Load the trained classifier for evaluation, on the CPU in FP32."""
    classifier = build_classifier()
    classifier.load_state_dict(load_file(directory / FILE_NAME))
    return classifier.eval()


def predict(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the digit seen in each image: images FP32 [B, 16, 16] in [0, 1] -> int64 [B]."""
    with torch.inference_mode():
        digits: torch.Tensor = classifier(images.unsqueeze(1)).argmax(-1)
    return digits


def accuracy(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction (0..1) of images recognised as their label: int64 [B]."""
    return (predict(classifier, images) == labels).double().mean().item()
