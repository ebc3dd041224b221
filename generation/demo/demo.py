"""The whole road on the built-in model: quantize, export, validate, build, and look at the pictures.

Every stage runs as the command that a user would type, in a process of its own; what one leaves on disk, the next
reads. So the demo imports no other room, and its log can be copied into a terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from calibration.checkpoints.plain import BUILT_IN
from calibration.digits import DIRECTORY
from calibration.recipes.recipe import FormatRules, load_recipe
from fp4trt.errors import StageFailed
from fp4trt.json_file import load_json
from fp4trt.number_formats import FORMATS
from fp4trt.publish import note_progress, progress_of, replacing, write_json
from fp4trt.targets import parse_gpus, require_format

__all__ = ["demo", "table"]

GRID: Final = "digits.png"
SUMMARY: Final = "demo.json"
OTHERS: Final = "others"

RECIPES: Final = ("nvfp4-ptq", "nvfp4-quality", "nvfp4-quality-r8")
"""The first is the artifact unless another is asked for; the others are compared with it. Recipes that train take
minutes: they have to be asked for."""

_PATIENCE_SECONDS: Final = 3.0
_INTERRUPTED: Final = 2
"""The status of a command that Ctrl-C ended."""

_STAGES: Final = ("quantize", "export", "validate", "build")

EVALUATION_SEED: Final = 1000
"""Seed of the starting noise; calibration takes seeds 0 to 3."""


def demo(
    directory: Path,
    gpu: str = "rtx5090",
    images: int = 500,
    force: bool = False,
    recipe: str = RECIPES[0],
    rows: Sequence[str] = (),
) -> dict[str, Any]:
    """Walk the road and return what the command prints as JSON.

    A run that was killed once the artifact was there resumes with the recipe that it was at.

    Args:
        directory: becomes the quantized checkpoint, with ``model.onnx``, ``validation/``, the engine, ``digits.png``
            and ``demo.json`` in it; written as ``DIRECTORY.partial`` and renamed.
        gpu: the target of the engine.
        images: how many digits to draw with each model for accuracy, PSNR and velocity error.
        force: replace an earlier result.
        recipe: of the artifact; the models of :data:`RECIPES` are only drawn with, to compare.
        rows: recipes to compare besides.

    Raises:
        BadRecipe: there is no such recipe.
        UnknownGpuError, UnsupportedFormatError: there is no such GPU, or it does not compute the artifact's formats.
        OutputExists: the directory holds something that fp4trt did not write.
        StageFailed: a command ended with an error, which it has printed; carries its exit status.
    """
    recipes = {load_recipe(name).name: name for name in (recipe, *RECIPES, *rows)}
    _require_gpu(gpu, load_recipe(recipe).formats)
    identity = json.dumps({"gpu": gpu, "recipe": load_recipe(recipe).resolved()})
    with replacing(directory, force, identity) as partial:
        result = _walk(partial, partial / directory.name, gpu, images, recipes)
        note_progress(partial, {})  # from here on there is nothing to resume from
        for path in (partial / directory.name).iterdir():
            os.replace(path, partial / path.name)
        (partial / directory.name).rmdir()
        shutil.rmtree(partial / OTHERS)
    return {
        **result,
        "checkpoint": str(directory.resolve()),
        **{key: str((directory / result[key]).resolve()) for key in ("onnx", "engine", "grid", "report")},
    }


def _require_gpu(gpu: str, rules: FormatRules) -> None:
    """Refuse a GPU that the last stage, minutes later, would refuse."""
    targets = parse_gpus(gpu)
    for name, kind in FORMATS.items():
        if kind.elsewhere is None and name in (rules.default, *(rule.format for rule in rules.rules)):
            require_format(targets, name)


def _walk(partial: Path, directory: Path, gpu: str, images: int, recipes: Mapping[str, str]) -> dict[str, Any]:
    """Run every stage that is not done yet; paths in the result are relative to ``directory``.

    Args:
        partial: where progress is noted.
        directory: of the artifact, inside.
        gpu: to build for.
        images: to draw.
        recipes: name to preset or file; the first is the artifact's.
    """
    first, *others = recipes
    done = progress_of(partial)
    if not done:
        for left in (directory, partial / OTHERS):
            shutil.rmtree(left, ignore_errors=True)
        done = {"artifact": _artifact(directory, recipes[first], gpu), "rows": {}}
        note_progress(partial, done)
    quantized, exported, validation, built = (done["artifact"][name] for name in _STAGES)
    folders, sizes = {first: directory}, {first: quantized["bytes"]}
    for name in others:
        folders[name] = partial / OTHERS / name
        resolved = load_recipe(recipes[name]).resolved()
        row = done["rows"].get(name, {})
        if row.get("recipe") != resolved:
            made = _run("quantize", BUILT_IN, "-o", str(folders[name]), "--recipe", recipes[name], "--force")
            done["rows"][name] = row = {"recipe": resolved, "bytes": made["bytes"]}
            note_progress(partial, done)
        sizes[name] = row["bytes"]
    quality = _measure(folders, directory / GRID, images)
    for name, figures in quality["recipes"].items():
        figures["bytes"] = sizes[name]
    result = {
        "onnx": Path(exported["onnx"]).name,
        "engine": Path(built["engine"]).name,
        "grid": GRID,
        "report": "validation/report.html",
        "validation": {"passed": validation["passed"], "gates": validation["gates"]},
        "bf16_bytes": quantized["source_bytes"],
        "recipe": quantized["recipe"],
        "quantized_linears": quantized["quantized_linears"],
        "sharing_cost": quantized["sharing_cost"],
        "gpu": gpu,
        **{key: built[key] for key in ("engine_bytes", "fp4_gemms", "fp4_linears")},
        **quality,
        "passed": bool(validation["passed"]),
    }
    write_json(directory / SUMMARY, result)
    return result


def _artifact(directory: Path, recipe: str, gpu: str) -> dict[str, dict[str, Any]]:
    """Take the artifact down the road; return what each stage says."""
    words = {
        "quantize": (BUILT_IN, "-o", str(directory), "--recipe", recipe),
        "export": (str(directory),),
        "validate": (str(directory),),
        "build": (str(directory), "--gpu", gpu),
    }
    return {stage: _run(stage, *words[stage], may_fail=stage == "validate") for stage in _STAGES}


def _run(*arguments: str, may_fail: bool = False) -> dict[str, Any]:
    """Run one fp4trt command, its human lines passing through to stderr, and return its JSON."""
    click.echo(f"$ fp4trt {' '.join(arguments)}")
    sys.stdout.flush()
    command = [sys.executable, "-m", "fp4trt", *arguments, "--json"]
    status, printed = _completed(command)
    if status and not (may_fail and status == 1 and printed.strip()):
        raise StageFailed(f"its stage {arguments[0]} ended with status {status}", status)
    result: dict[str, Any] = json.loads(printed)
    return result


def _completed(command: list[str]) -> tuple[int, str]:
    """Run a stage to its end; return its status and what it printed.

    Raises:
        click.exceptions.Exit: Ctrl-C ended the stage, which has said so itself.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as stage:
        try:
            printed, _ = stage.communicate()
        except KeyboardInterrupt:
            # A terminal interrupts the stage too. Only where it was not, it has to hear of it from here.
            try:
                stage.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                stage.terminate() if sys.platform == "win32" else stage.send_signal(signal.SIGINT)
                stage.wait()
            if stage.returncode == _INTERRUPTED:
                raise click.exceptions.Exit(_INTERRUPTED) from None
            raise
        return stage.returncode, printed


def _measure(folders: Mapping[str, Path], picture: Path, images: int) -> dict[str, Any]:
    """Compare all models on prompts and noise that calibration has not seen, and draw some of the digits."""
    import torch

    from calibration.checkpoints.quantized import load
    from calibration.checkpoints.threads import suited_threads
    from calibration.digits.model import load_transformer
    from generation.comparison.digits import compare
    from generation.comparison.statistics import estimate
    from generation.demo.grid import grid

    click.echo(f"drawing {images} digits with each model")
    reference = load_transformer()
    models = {name: load(folder, dtype=torch.float32) for name, folder in folders.items()}
    with suited_threads(load_json(DIRECTORY / "config.json")):
        compared = compare(reference, models, (EVALUATION_SEED,), images)
        grid(reference, models, picture, seed=EVALUATION_SEED)
    metrics = {"accuracy": "recognised", "psnr_db": "psnr_db", "velocity_error": "velocity_error"}
    return {
        "accuracy_bf16": estimate(compared.reference["recognised"]).mean,
        "recipes": {
            name: {key: compared.estimate(name, metric).mean for key, metric in metrics.items()} for name in models
        },
        "images": images,
    }


def table(result: dict[str, Any]) -> str:
    """Return the demo's one table: what was before, what is after."""
    verdict = "passed" if result["validation"]["passed"] else "FAILED"
    recipes: dict[str, dict[str, float]] = result["recipes"]
    rows: list[tuple[str, ...]] = [
        ("", "BF16", *recipes),
        ("checkpoint, bytes", f"{result['bf16_bytes']:,}", *(f"{each['bytes']:,}" for each in recipes.values())),
        ("digits recognised", f"{result['accuracy_bf16']:.1%}", *(f"{e['accuracy']:.1%}" for e in recipes.values())),
        ("image PSNR", "", *(f"{each['psnr_db']:.1f} dB" for each in recipes.values())),
        ("velocity error", "", *(f"{each['velocity_error']:.3f}" for each in recipes.values())),
        ("validation of the graph", "", verdict),
        (f"engine for {result['gpu']}, bytes", "", f"{result['engine_bytes']:,}"),
        ("FP4 GEMMs", "", str(result["fp4_gemms"])),
        ("linears they cover", "", f"{result['fp4_linears']} of {result['quantized_linears']}"),
    ]
    full = [(*row, *("" for _ in range(len(rows[0]) - len(row)))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = [
        "  ".join(f"{cell:{'>' if index else '<'}{widths[index]}}" for index, cell in enumerate(row)).rstrip()
        for row in full
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
