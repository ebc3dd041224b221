"""What of the options of ``fp4trt quantize`` is refused before torch is imported, or any process started."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from calibration.by_block.cores import cores
from calibration.checkpoints.source import find_source
from calibration.inputs.given import is_amax, paths_of, require_captured
from calibration.recipes.recipe import QAT, Recipe, load_recipe, load_start, quantizes_by_block
from fp4trt import publish
from fp4trt.errors import BadInputs, BadOption

__all__ = ["first_checked"]


def first_checked(
    source: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe | None,
    calibration: str | Path | Sequence[str | Path] | None,
    modelopt_state: str | Path | None,
    force: bool,
    workers: int | None,
    ray: str | None,
    like: str | Path | None,
    lora: str | Path | Sequence[str | Path],
) -> tuple[Recipe, Path]:
    """Return the recipe, and the folder of the source.

    Args:
        source, output, recipe, calibration, modelopt_state, force, workers, ray, like, lora: as
            :func:`calibration.quantization.quantize` takes them.

    Raises:
        BadRecipe, BadOption, BadInputs, BadCheckpoint, OutputExists: naming what is wrong.
    """
    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe or _usual_recipe(calibration))
    if calibration and modelopt_state is not None:
        raise BadInputs("both a calibration and a ModelOpt state were given; expected one of them")
    _refuse_workers(workers, ray, None if modelopt_state is not None else chosen)
    folder = find_source(source, like, lora)
    publish.refuse_foreign(Path(output), force)
    if not is_amax(calibration):
        for path in paths_of(calibration):
            require_captured(path)
    if ray is not None and importlib.util.find_spec("ray") is None:
        import ray as _  # noqa: F401  which says what is not installed
    return chosen, folder


def _usual_recipe(calibration: str | Path | Sequence[str | Path] | None) -> str:
    """Return the preset that makes the most of what is there: amax values allow no more than rounding to nearest."""
    return "nvfp4-ptq" if is_amax(calibration) else "nvfp4-quality"


def _refuse_workers(workers: int | None, ray: str | None, recipe: Recipe | None) -> None:
    """Refuse workers where they would have nothing to share, or there are fewer cores.

    Args:
        workers, ray: as they were asked for.
        recipe: that is quantized by; None for a state of ModelOpt's.

    Raises:
        BadOption: naming the option.
    """
    if workers is None and ray is None:
        return
    asked = f"workers is {workers}" if ray is None else f"ray is {ray!r}"
    start = load_start(recipe) if recipe and isinstance(recipe.method, QAT) else recipe
    if start is None or not quantizes_by_block(start.method):
        what = f"{start.name} has no such work" if start else "a state of ModelOpt's has no such work"
        raise BadOption(
            f"{asked}, which is for recipes that choose values block by block, such as nvfp4-quality: {what}; "
            "leave the option out"
        )
    if ray is None and (workers or 0) > cores():
        raise BadOption(f"{asked}; expected at most {cores()}, which is how many cores there are")
