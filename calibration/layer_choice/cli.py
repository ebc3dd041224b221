"""The command ``fp4trt search``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from calibration.source_options import LIKE, LORA

__all__ = ["search"]

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=_PATH, required=True, help="The folder to write.")
@click.option(
    "--fp8-budget",
    "budget",
    type=click.FloatRange(0, 4),
    required=True,
    help="What may be spent beyond NVFP4; 1 is what all linears in FP8 cost.",
)
@click.option(
    "--of",
    type=click.Choice(["flops", "bytes", "both"]),
    default="both",
    show_default=True,
    help="What the budget is of; both: neither FLOPs nor bytes may exceed it.",
)
@click.option(
    "--recipe", default="nvfp4-quality", show_default=True, help="A name of fp4trt recipes, or a YAML file: the method."
)
@click.option("--calibration", type=_PATH, help="Captured inputs (.safetensors) of fp4trt calibrate --save-inputs.")
@click.option("--bf16/--no-bf16", default=True, show_default=True, help="Whether linears may stay in 16 bit.")
@click.option(
    "--calls", type=click.IntRange(1), default=16, show_default=True, help="Captured calls to measure on, at most."
)
@click.option("--sensitivity", type=_PATH, help="search.json of an earlier search: choose again without measuring.")
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(1),
    multiple=True,
    help="A rank that a low-rank branch beside NVFP4 may have; more than once for several.  [default: no branches]",
)
@click.option(
    "--launch-cost",
    type=click.FloatRange(0),
    help="FLOPs of NVFP4 that each of a branch's two kernels costs beside its work.  [default: 2e9, 1.2 us of an RTX "
    "5090]",
)
@LIKE
@LORA
@click.option("--force", is_flag=True, help="Replace an earlier result.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)
def search(
    source: str,
    output: Path,
    budget: float,
    of: str,
    recipe: str,
    calibration: Path | None,
    bf16: bool,
    calls: int,
    sensitivity: Path | None,
    ranks: tuple[int, ...],
    launch_cost: float | None,
    like: Path | None,
    lora: tuple[str, ...],
    force: bool,
    device: str,
) -> Any:
    """Choose NVFP4, FP8 or BF16 for each linear by measurement, and write the choice as a recipe.

    With --rank, also how large a low-rank branch in BF16 stands beside NVFP4.

    SOURCE is a checkpoint in 16 bit, as quantize takes it, or "digits" for the built-in model. What counts is the
    error of the model's output; linears that TensorRT runs as one GEMM are taken together. The model is in memory; a
    command that was killed resumes after the last block that it had measured.

    \b
    Example:
      fp4trt search digits -o search --fp8-budget 0.2
      fp4trt quantize digits -o digits-mixed --recipe search/recipe.yaml
      fp4trt search digits -o search-less --fp8-budget 0.1 --sensitivity search/search.json
      fp4trt search digits -o search-ranks --fp8-budget 0.2 --rank 8 --rank 16 --launch-cost 0
    """
    from calibration.layer_choice.search import search as run

    result = run(
        source,
        output,
        budget,
        of=of,
        recipe=recipe,
        calibration=calibration,
        bf16=bf16,
        calls=calls,
        sensitivity=sensitivity,
        ranks=ranks,
        launch_cost=launch_cost,
        like=like,
        lora=lora,
        force=force,
        device=device,
    )
    click.echo(result.table)
    words = ["fp4trt", "quantize", source, *(["--like", str(like)] if like is not None else ())]
    words += [word for one in lora for word in ("--lora", one)]
    recipe_file = output / "recipe.yaml"
    click.echo(f"\nthe recipe is in {output}: {shlex.join([*words, '--recipe', str(recipe_file)])} -o ...")
    return result
