"""The judge of a model that draws small images: a small CNN trained on real ones only."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from calibration.digits import DIRECTORY
from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import what_it_lacks

__all__ = ["FILE_NAME", "accuracy", "build_classifier", "load_classifier", "predict", "with_channels"]

FILE_NAME = "classifier.safetensors"


def build_classifier(channels: int = 1, size: int = 16, classes: int = 10) -> nn.Sequential:
    """Return the untrained classifier: images FP32 [B, channels, size, size] in [0, 1] -> logits [B, classes]."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * (size // 4) ** 2, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


def load_classifier(path: Path = DIRECTORY) -> nn.Sequential:
    """Load a trained classifier of any size for evaluation, on the CPU in FP32, from its file or the folder around it.

    Raises:
        BadCheckpoint: it is missing, or holds something else.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        state = load_file(path)
        channels, classes = state["0.weight"].shape[1], state["10.weight"].shape[0]
        classifier = build_classifier(channels, 4 * math.isqrt(state["8.weight"].shape[1] // 32), classes)
        classifier.load_state_dict(state)
    except FileNotFoundError:
        raise BadCheckpoint(f"{path} {what_it_lacks(path)}; expected the model's classifier") from None
    except (IndexError, KeyError, RuntimeError, SafetensorError):
        raise BadCheckpoint(f"{path} holds other tensors than a classifier; copy it again") from None
    return classifier.eval()


def predict(classifier: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the label seen in each image: images FP32 [B, H, W] or [B, C, H, W] in [0, 1] -> int64 [B]."""
    with torch.inference_mode():
        labels: torch.Tensor = classifier(with_channels(images)).argmax(-1)
    return labels


def with_channels(images: torch.Tensor) -> torch.Tensor:
    """Return images [B, H, W] or [B, C, H, W] as [B, C, H, W]."""
    return images.unsqueeze(1) if images.ndim == 3 else images


def accuracy(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction (0..1) of images recognised as their label: int64 [B]."""
    return (predict(classifier, images) == labels).double().mean().item()
