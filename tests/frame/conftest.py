"""The commands that write something, each with what it needs but an output."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def commands(quantized_digits: Path, five_calls: Path) -> dict[str, list[object]]:
    return {
        "calibrate": ["calibrate", "digits", "--inputs", five_calls],
        "quantize": ["quantize", "digits", "--recipe", "nvfp4-ptq", "--calibration", five_calls],
        "export": ["export", quantized_digits],
        "build": ["build", quantized_digits],
        "validate": ["validate", quantized_digits],
    }
