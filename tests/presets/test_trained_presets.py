"""Presets that train become checkpoints whose graph is that of plain rounding."""

from __future__ import annotations

import json

import pytest

from calibration.recipes.recipe import load_recipe, preset_names

pytestmark = pytest.mark.slow


TRAINED = {name: recipe.method for name in preset_names() if (recipe := load_recipe(name)).method.name == "qat"}


# What trains branches keeps the graph of its start: tests/calibration/methods/test_branch_training.py.
@pytest.mark.parametrize("name", [name for name, method in TRAINED.items() if method.learn != "branch"])
def test_a_preset_changes_no_more_than_weights_and_scales(name, quantize_plain, tmp_path):
    recipe = load_recipe(name).resolved()
    recipe["method"] |= {"steps": 3, "batch": 4, "warm_up": 1}
    (tmp_path / "few-steps.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    weights = quantize_plain(tmp_path / "few-steps.yaml")
    assert len(weights) == 20  # folds scale columns, so that weights are far from those of the source
