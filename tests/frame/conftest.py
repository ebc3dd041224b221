"""The commands that write something, each with what it needs but an output."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def commands(quantized_digits: Path) -> dict[str, list[object]]:
    inputs = quantized_digits / "calibration" / "inputs.safetensors"
    return {
        "calibrate": ["calibrate", "digits", "--inputs", inputs],
        "quantize": ["quantize", "digits", "--recipe", "nvfp4-ptq", "--calibration", inputs],
        "export": ["export", quantized_digits],
        "build": ["build", quantized_digits],
        "validate": ["validate", quantized_digits],
    }
