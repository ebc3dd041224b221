"""Presets that train become checkpoints whose graph is that of plain rounding."""

from __future__ import annotations

import pytest

from calibration.recipe import load_recipe, preset_names


@pytest.mark.parametrize("name", [name for name in preset_names() if load_recipe(name).method.name == "qat"])
def test_a_preset_changes_no_more_than_weights_and_scales(name, quantize_plain):
    assert len(quantize_plain(name)) == 20  # folds scale columns, so that weights are far from those of the source
