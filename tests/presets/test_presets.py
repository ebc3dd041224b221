"""Presets of our own methods that train nothing go all the way to an engine, and keep what they promise."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_the_best_preset_becomes_an_engine_with_all_gates_passed(walk):
    walk("nvfp4-quality")  # that of SVDQuant is tests/trt_build/test_svdquant_engine.py's


def test_plain_rounding_has_the_error_of_the_format(quantize_plain):
    errors = quantize_plain("nvfp4-ptq")
    assert len(errors) == 20
    assert 0.08 < min(errors.values()) < max(errors.values()) < 0.12
