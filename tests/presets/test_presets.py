"""Every preset of our own methods that trains nothing goes all the way to an engine, and keeps what it promises."""

from __future__ import annotations

import pytest

from calibration.recipe import load_recipe, preset_names


@pytest.mark.parametrize(
    "name", [name for name in preset_names() if load_recipe(name).method.name not in ("modelopt", "qat")]
)
def test_a_preset_becomes_an_engine_with_all_gates_passed(name, walk):
    walk(name)
