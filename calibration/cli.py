"""The commands of this room: ``fp4trt calibrate``, ``fp4trt recipes`` and ``fp4trt quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.source_options import LIKE, LORA

if TYPE_CHECKING:
    from calibration.by_block.calibration import Calibrated
    from calibration.quantization import Quantized

__all__ = ["calibrate", "quantize", "recipes"]

_PATH = click.Path(path_type=Path)
_DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to compute."
)


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=_PATH, required=True, help="The JSON file to write: {module path: amax}.")
@click.option("--inputs", type=_PATH, help="Captured transformer inputs (.safetensors) to run on.")
@click.option("--prompts", type=_PATH, help="A text file, one prompt a line, for the family's pipeline.")
@click.option(
    "--pictures",
    "--images",
    type=_PATH,
    metavar="FOLDER|FILE",
    help="What pipelines that edit or continue pictures read beside the prompts, in turn.",
)
@click.option("--save-inputs", type=_PATH, help="Keep the captured inputs here, to repeat the calibration exactly.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps a prompt.  [default: the pipeline's own]")
@click.option("--resolution", type=click.IntRange(16), help="Pixels of a side.  [default: the pipeline's own]")
@click.option("--frames", type=click.IntRange(1), help="Frames of a video.  [default: the pipeline's own]")
@click.option("--guidance", type=click.FloatRange(0), help="Scale of the guidance.  [default: the pipeline's own]")
@LIKE
@LORA
@_DEVICE
@click.option("--force", is_flag=True, help="Replace existing results.")
def calibrate(
    source: str,
    output: Path,
    inputs: Path | None,
    prompts: Path | None,
    pictures: Path | None,
    save_inputs: Path | None,
    steps: int | None,
    resolution: int | None,
    frames: int | None,
    guidance: float | None,
    like: Path | None,
    lora: tuple[str, ...],
    device: str,
    force: bool,
) -> Calibrated:
    """Measure how large the inputs of the linears become, over the whole denoising schedule.

    SOURCE is a checkpoint in 16 bit: a diffusers folder (a transformer's or a pipeline's), a single file (safetensors
    or GGUF, under BFL's, ComfyUI's or diffusers' names), a hub name, or "digits" for the built-in model. One block is
    in memory at a time; a command that was killed resumes with its first unfinished block.

    \b
    Example:
      fp4trt calibrate digits -o amax.json --save-inputs inputs.safetensors
      fp4trt calibrate FLUX.1-dev -o amax.json --prompts prompts.txt --steps 20
      fp4trt calibrate Wan2.2-T2V-A14B-Diffusers/transformer_2 -o amax-2.json --prompts prompts.txt --frames 33
    """
    from calibration.by_block.calibration import calibrate as run

    result = run(
        source,
        output,
        inputs=inputs,
        prompts=prompts,
        save_inputs_to=save_inputs,
        steps=steps,
        resolution=resolution,
        force=force,
        device=device,
        pictures=pictures,
        frames=frames,
        guidance=guidance,
        like=like,
        lora=lora,
    )
    click.echo(f"calibrated {result.linears} linears on {result['calls']} calls -> {output}")
    return result


@click.command()
@click.argument("name", metavar="[NAME|FILE]", required=False)
def recipes(name: str | None) -> dict[str, Any]:
    """List the recipes that come with the package, or check one and show all that it says.

    A recipe is a YAML file; copy one that is shown, change it, and give the file to quantize.

    \b
    Example:
      fp4trt recipes
      fp4trt recipes nvfp4-ptq > mine.yaml
      fp4trt quantize digits -o digits-fp4 --recipe mine.yaml
    """
    import yaml

    from calibration.recipes.recipe import load_recipe, preset_names

    if name is not None:
        described = load_recipe(name).described()
        click.echo(yaml.safe_dump(described, sort_keys=False, width=100).rstrip())
        return described
    presets = [load_recipe(preset) for preset in preset_names()]
    width = max(len(preset.name) for preset in presets)
    for preset in presets:
        click.echo(f"{preset.name:<{width}}  {preset.description}")
    return {"recipes": [preset.described() for preset in presets]}


@click.command()
@click.argument("source")
@click.option("-o", "--output", type=_PATH, required=True, help="The folder to write.")
@click.option(
    "--recipe",
    help="A name of fp4trt recipes, or a YAML file.  [default: nvfp4-quality; nvfp4-ptq where only amax is given; "
    "what a state itself says]",
)
@click.option(
    "--calibration",
    type=_PATH,
    multiple=True,
    help="Amax values (.json; more than once to merge several) or captured inputs (.safetensors).",
)
@click.option(
    "--modelopt-state", type=_PATH, help="A state of modelopt.torch.opt.save: formats, weights and scales are its own."
)
@click.option(
    "--trust", is_flag=True, help="Load --modelopt-state although it is a pickle, which can execute arbitrary code."
)
@LIKE
@LORA
@click.option(
    "--for",
    "server",
    type=click.Choice(["sglang", "vllm-omni", "tensorrt-llm"]),
    help="A server that is to load the result: linears that it takes in BF16 alone stay so, and a recipe that it "
    "cannot load is refused.",
)
@click.option("--force", is_flag=True, help="Replace an existing result.")
@_DEVICE
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Processes that share the blocks, and the cores; for recipes that choose values block by block (quality, "
    "svdquant, modelopt, and what qat starts from), refused for others.  [default: this process alone]",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Share the blocks by Ray (extra ray): a cluster's HOST:PORT or auto; without an address on this machine. Give "
    "it last, or as --ray=ADDRESS.",
)
def quantize(
    source: str,
    output: Path,
    recipe: str | None,
    calibration: tuple[Path, ...],
    modelopt_state: Path | None,
    trust: bool,
    like: Path | None,
    lora: tuple[str, ...],
    server: str | None,
    force: bool,
    device: str,
    workers: int | None,
    ray: str | None,
) -> Quantized:
    """Quantize a BF16 checkpoint, to NVFP4 unless the recipe says otherwise.

    SOURCE is a checkpoint in 16 bit: a diffusers folder (a transformer's or a pipeline's), a single file (safetensors
    or GGUF, under BFL's, ComfyUI's or diffusers' names), a hub name (OWNER/NAME, or OWNER/NAME/FILE), or "digits" for
    the built-in model, which brings its own calibration data.

    \b
    Example:
      fp4trt quantize digits -o digits-fp4
      fp4trt quantize FLUX.1-dev -o flux-fp4 --calibration amax.json
      fp4trt quantize flux1-dev.safetensors -o flux-fp4 --calibration amax.json
      fp4trt quantize FLUX.1-dev -o flux-fp4 --calibration machine-1.json --calibration machine-2.json
      fp4trt quantize FLUX.1-dev -o flux-fp4 --calibration inputs.safetensors --workers 4
      fp4trt quantize FLUX.1-dev -o flux-style --calibration inputs.safetensors --lora style.safetensors:0.8
      fp4trt quantize FLUX.1-dev -o flux-sglang --calibration inputs.safetensors --for sglang
    """
    if ray == "local" or (ray is None and workers and workers > 1):
        from calibration.by_block import fork_server, ray_cluster
        from calibration.first_checks import first_checked
        from fp4trt.progress import reporting

        with reporting(note=lambda _: None):  # they are said when the work begins
            first_checked(source, output, recipe, calibration, modelopt_state, force, workers, ray, like, lora)
        (ray_cluster if ray else fork_server).start_early()  # what is imported here takes seconds
    from calibration.quantization import quantize as run
    from fp4trt.number_formats import linears_in_words

    result = run(
        source,
        output,
        recipe=recipe,
        calibration=calibration,
        modelopt_state=modelopt_state,
        trust=trust,
        force=force,
        device=device,
        workers=workers,
        ray=ray,
        like=like,
        lora=lora,
        server=server,
    )
    attention = f", {result.fp8_attentions} attentions in FP8" if result.fp8_attentions else ""
    click.echo(
        f"quantized {linears_in_words(result.formats)}{attention} ({result.recipe}): "
        f"{result.source_bytes:,} -> {result.bytes:,} bytes -> {output}"
    )
    if (state := result.modelopt_state) is not None:
        click.echo(
            f"it computes what the model of {modelopt_state} computes: relative difference {state['difference']:.2g} "
            f"on {state['inputs']} inputs (ModelOpt's {', '.join(state['algorithms']) or 'no calibration'})"
        )
        if state["apart"]:
            click.echo(
                f"each linear keeps its own scales, as in the state: {state['apart']} FP4 GEMMs more than shared"
            )
    if cost := result.sharing_cost:
        text = f"one weight scale for each of {result.groups} groups costs: "
        text += f"weight error {cost['weight_own']:.3%} -> {cost['weight_shared']:.3%}"
        click.echo(text)
    return result
