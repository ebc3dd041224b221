"""The table of models in the documents is of these models, and is what its runs have found."""

from __future__ import annotations

from fp4trt.json_file import load_json
from tests.frame.diffusers_models import MODELS
from tests.frame.models_table import GUIDE, RECIPES, TABLE, table, written_into


def test_the_table_holds_every_small_model_in_every_format_with_the_gemms_that_are_tested() -> None:
    cells = load_json(TABLE)
    assert {name: set(formats) for name, formats in cells.items()} == {name: set(RECIPES) for name in MODELS}
    assert {name: cells[name]["nvfp4"]["rtx5090"]["gemms"] for name in MODELS} == {
        name: model.gemms for name, model in MODELS.items()
    }
    assert list(cells) == list(MODELS)


def test_the_document_shows_what_was_found() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert written_into(guide, table(load_json(TABLE))) == guide
