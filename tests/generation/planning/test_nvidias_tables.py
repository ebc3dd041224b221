"""The memory that is planned for FLUX.1-dev, against what NVIDIA's demos measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fp4trt

GIB = 1 << 30

TENSORRT = {"fp16": (39.3, 23.9), "bf16": (35.7, 23.9), "fp8": (24.6, 14.9), "fp4": (21.67, 11.1)}
"""demoDiffusion's README, "FLUX VRAM Requirements", at its 1024 x 1024: default and --low-vram. The two constants of
:mod:`generation.planning.peaks` were fitted to the row in FP8."""

TENSORRT_RTX = {"bf16": (32.1, 23.1), "fp8": (21.6, 12.0), "fp4": (20.5, 11.0)}
"""TensorRT-RTX's demo README, at its 512 x 512: nothing was fitted to it."""

HEADS, TEXT, SCORE_BYTES = 24, 512, 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModelOpt's default NVFP4, which leaves ``*proj_out*`` in 16 bit: a single block's too."""
    path = tmp_path_factory.mktemp("recipe") / "left.yaml"
    rules = "[{linears: 'single_transformer_blocks.*.proj_out', format: bf16}]"
    path.write_text(f"name: fp4\nmethod: {{name: ptq}}\nformats: {{rules: {rules}}}\n", encoding="utf-8")
    return path


def predicted(recipe: Path, resolution: int) -> dict[str, tuple[float, float]]:
    """Return the peaks in GiB; in FP8, whose attention is FP8 too there, with its scores in memory."""
    plan = fp4trt.plan("FLUX.1", gpu="rtxpro6000", resolution=resolution, recipe=["fp8-ptq", recipe])
    tokens = (resolution // 16) ** 2 + TEXT
    scores = HEADS * tokens**2 * SCORE_BYTES  # two bytes as they come out, one as they go into the second product

    def peaks(form: dict[str, Any]) -> tuple[float, float]:
        resident, on_demand = form["modes"]["resident"], form["modes"]["on_demand"]
        if form["name"] != "fp8-ptq":
            return resident["peak_bytes"] / GIB, on_demand["peak_bytes"] / GIB
        assert on_demand["stage"] == "denoise"
        more = max(0, form["activation_bytes"] + scores - resident["workspace_bytes"])
        return (resident["peak_bytes"] + more) / GIB, (on_demand["peak_bytes"] + scores) / GIB

    return {str(form["name"]).removesuffix("-ptq"): peaks(form) for form in plan.forms}


@pytest.mark.parametrize(
    ("table", "resolution", "error"), [(TENSORRT, 1024, 0.03), (TENSORRT_RTX, 512, 0.125)], ids=["TensorRT", "RTX"]
)
def test_every_cell_is_met(table: dict[str, tuple[float, float]], resolution: int, error: float, recipe: Path) -> None:
    found = predicted(recipe, resolution)
    errors = {
        name: [mine / theirs - 1 for mine, theirs in zip(found[name], row, strict=True)] for name, row in table.items()
    }
    assert {name: cells for name, cells in errors.items() if max(map(abs, cells)) > error} == {}


def test_the_cells_that_were_fitted_are_met_to_the_figures_that_are_printed(recipe: Path) -> None:
    assert [round(cell, 1) for cell in predicted(recipe, 1024)["fp8"]] == list(TENSORRT["fp8"])


def test_with_every_linear_in_fp4_its_row_is_met_within_a_tenth() -> None:
    plan = fp4trt.plan("FLUX.1", gpu="rtxpro6000", recipe="nvfp4-ptq")
    modes = plan.forms[-1]["modes"]
    found = (modes["resident"]["peak_bytes"] / GIB, modes["on_demand"]["peak_bytes"] / GIB)
    assert found == pytest.approx(TENSORRT["fp4"], rel=0.1)
