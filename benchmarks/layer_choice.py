"""Which linears to put into FP8: the error left by `fp4trt search`, by ModelOpt's auto_quantize, and by chance.

Every chooser spends the same bytes on the built-in model, on groups that TensorRT runs as one GEMM. What it chose
becomes a recipe, that recipe quantizes the model, and the model's output is compared with the plain one's, on all
captured calls. auto_quantize scores a format by the squared product of a gradient with the difference that the format
makes; a distance to the plain model's own output has no gradient there, so it is given the output's product with seeded
noise, which makes its score an estimate of the output's squared error. It knows of plain rounding only.

`python benchmarks/layer_choice.py --budget 0.1 --recipe nvfp4-ptq` asks for less.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from measure.result import machine, publish  # noqa: E402

from calibration import quantize  # noqa: E402
from calibration.by_block.calibration import captured_from  # noqa: E402
from calibration.checkpoints.plain import find_source, load_source  # noqa: E402
from calibration.checkpoints.quantized import load  # noqa: E402
from calibration.formats.modelopt_backend import FP8, NVFP4, mtq  # noqa: E402
from calibration.layer_choice.allocation import allocate  # noqa: E402
from calibration.layer_choice.measurement import relative_error, spread  # noqa: E402
from calibration.layer_choice.search import DATA, search  # noqa: E402
from calibration.layer_choice.sensitivity import Sensitivity  # noqa: E402
from calibration.recipes.recipe import FormatRules, Recipe, load_recipe  # noqa: E402
from fp4trt.families.digits import DIGITS  # noqa: E402
from fp4trt.json_file import load_json  # noqa: E402

SDPA = torch.nn.functional.scaled_dot_product_attention
CALLS = 16
DRAWS = 3
DIGITS_FOLDER = find_source("digits")
GROUPS = DIGITS.groups(load_json(DIGITS_FOLDER / "config.json"))

Formats = Mapping[str, str]


def with_search(recipe: str, folder: Path) -> Sensitivity:
    """Measure every group as `fp4trt search` does."""
    search("digits", folder / "search", 0.1, recipe=recipe, calls=CALLS)
    return Sensitivity.from_dict(load_json(folder / "search" / DATA)["sensitivity"])


def with_auto_quantize(budgets: Sequence[float]) -> list[Formats]:
    """Let ModelOpt choose, for bytes; return first linear of each group to format."""
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher
    from modelopt.torch.quantization.plugins.diffusion import diffusers as diffusers_plugin

    calls = spread(captured_from(DIGITS_FOLDER, None).calls, CALLS)
    first = {path: group[0] for group in GROUPS for path in group}
    noise = torch.Generator().manual_seed(0)
    # Its attention in diffusers models has no backward; with nothing of attention quantized, torch's own is the same.
    diffusers_plugin.FP8SDPA = SimpleNamespace(apply=lambda q, k, v, *rest: SDPA(q, k, v, *rest[:3], scale=rest[3]))
    AutoQuantizeGradientSearcher.quant_grouping_rules = [lambda _, name: first.get(name)]
    formats = [config(NVFP4, 4.5), config(FP8, 8)]
    chosen: list[Formats] = []
    for budget in budgets:
        model = load_source(DIGITS_FOLDER)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        sizes = {name: layer.weight.numel() for name, layer in linears.items()}
        searched = sum(sizes[name] for name in first)
        bits = (searched * (4.5 + 3.5 * budget) + (sum(sizes.values()) - searched) * 16) / sum(sizes.values())
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, state = mtq.auto_quantize(
                model,
                constraints={"effective_bits": bits},
                quantization_formats=formats,
                data_loader=calls,
                forward_step=lambda net, call: net(**call, return_dict=False)[0],
                loss_func=lambda output, _: (output.float() * torch.randn(output.shape, generator=noise)).sum(),
                disabled_layers=sorted(linears.keys() - first.keys()),
                num_calib_steps=len(calls),
                num_score_steps=len(calls),
                verbose=False,
            )
        found = state["best"]["recipe"]
        chosen.append({group[0]: format_of(found, group) for group in GROUPS})
    return chosen


def config(attributes: Mapping[str, Any], bits: float) -> dict[str, Any]:
    names = ("*weight_quantizer", "*input_quantizer")
    entries = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": name, "cfg": dict(attributes), "enable": True} for name in names]
    return {"quant_cfg": entries, "algorithm": "max", "effective_bits": bits}


def format_of(found: Mapping[str, Any], group: Sequence[str]) -> str:
    """Return the format of a group, which ModelOpt names by any of its linears."""
    (name,) = {str(found[f"{path}.quant_recipe"]) for path in group if f"{path}.quant_recipe" in found}
    return next(
        (kind for kind, custom in (("nvfp4", "CUSTOM_0"), ("fp8", "CUSTOM_1")) if name.startswith(custom)), "bf16"
    )


def by_chance(sensitivity: Sensitivity, budget: float, seed: int) -> Formats:
    """Put groups into FP8 in a random order, as long as the budget allows."""
    order, formats = list(GROUPS), dict.fromkeys((group[0] for group in GROUPS), "nvfp4")
    random.Random(seed).shuffle(order)
    for group in order:
        tried = {**formats, group[0]: "fp8"}
        formats = tried if sensitivity.spent(tried, "bytes") <= budget else formats
    return formats


def error_of(base: str, formats: Formats, folder: Path, calls: Sequence[Any], wanted: Sequence[torch.Tensor]) -> float:
    """Quantize by a recipe with these formats; return the relative error of the output."""
    rules = [{"linears": [path], "format": formats[group[0]]} for group in GROUPS for path in group]
    start = load_recipe(base)
    recipe = Recipe.model_validate({**start.described(), "formats": FormatRules.model_validate({"rules": rules})})
    quantize("digits", folder, recipe=recipe, force=True)
    model = load(folder)
    with torch.no_grad():
        return relative_error([model(**call, return_dict=False)[0] for call in calls], wanted) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, action="append", help="of bytes; all in FP8 cost 1")
    parser.add_argument("--recipe", action="append", help="whose method quantizes")
    given = parser.parse_args()
    budgets, recipes = given.budget or [0.05, 0.1, 0.2, 0.5], given.recipe or ["nvfp4-ptq", "nvfp4-quality"]
    before, rows = machine(), []
    calls = captured_from(DIGITS_FOLDER, None).calls
    plain = load_source(DIGITS_FOLDER)
    with torch.no_grad():
        wanted = [plain(**call, return_dict=False)[0] for call in calls]
    started = time.process_time()
    theirs = with_auto_quantize(budgets)
    their_seconds = (time.process_time() - started) / len(budgets)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for recipe in recipes:
            started = time.process_time()
            sensitivity = with_search(recipe, folder / recipe)
            seconds = time.process_time() - started
            for budget, auto in zip(budgets, theirs, strict=True):
                ours = allocate(sensitivity, budget, "bytes")
                only_fp8 = allocate(sensitivity, budget, "bytes", ("nvfp4", "fp8"))
                chance = [by_chance(sensitivity, budget, seed) for seed in range(DRAWS)]
                error = lambda formats: error_of(recipe, formats, folder / "made", calls, wanted)  # noqa: B023, E731
                found, theirs_error = error(ours), error(auto)
                rows.append(
                    {
                        "recipe": recipe,
                        "budget %": 100 * budget,
                        "search": 100 * found,
                        "without BF16": 100 * error(only_fp8),
                        "auto_quantize": 100 * theirs_error,
                        "by chance": 100 * sum(map(error, chance)) / DRAWS,
                        "auto_quantize / search": theirs_error / found,
                        "its budget %": 100 * sensitivity.spent(auto, "bytes"),
                        "search core-s": seconds,
                        "auto_quantize core-s": their_seconds,
                    }
                )
    notes = [
        f"Relative error, %, of the model's output on {len(calls)} captured calls; the search has seen {CALLS}.",
        f"`budget` is of bytes, beyond NVFP4, where all in FP8 cost 100 %; BF16 is {(16 - 4.5) / 3.5:.1f} times FP8.",
        "`search core-s` includes quantizing the model twice by the recipe, and measuring the frontier.",
    ]
    publish("layer_choice", rows, notes, before)


if __name__ == "__main__":
    main()
