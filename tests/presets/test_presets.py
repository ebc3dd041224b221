"""Presets of our own methods that train nothing go all the way to an engine, and keep what they promise."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_the_best_preset_becomes_an_engine_with_all_gates_passed(walk):
    engine = walk("nvfp4-quality-r8")  # that of SVDQuant is tests/trt_build/test_svdquant_engine.py's
    # Two products for each of 13 groups; the three modulations read one input, so that their first products are one.
    assert (engine["branch"]["linears"], engine["branch"]["kernels"]) == (20, 2 * 13 - 2)


def test_its_graph_without_branches_is_that_of_plain_rounding(quantize_plain):
    quantize_plain("nvfp4-quality")


def test_plain_rounding_has_the_error_of_the_format(quantize_plain):
    errors = quantize_plain("nvfp4-ptq")
    assert len(errors) == 20
    assert 0.08 < min(errors.values()) < max(errors.values()) < 0.12
