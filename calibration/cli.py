"""The commands of this room: ``fp4trt calibrate``, ``recipes``, ``quantize``, ``convert`` and ``lora``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from calibration.source_options import LIKE, LORA

if TYPE_CHECKING:
    from calibration.by_block.calibration import Calibrated
    from calibration.interchange.convert import Converted
    from calibration.lora_inputs import LoraInputs
    from calibration.quantization import Quantized

__all__ = ["calibrate", "convert", "lora", "quantize", "recipes"]

_PATH = click.Path(path_type=Path)
_LAYOUT = click.Choice(["comfyui", "diffusers", "bfl", "modelopt"])
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


@click.command()
@click.argument("checkpoint")
@click.option("--to", type=_LAYOUT, required=True, help="The layout to write.")
@click.option(
    "-o",
    "--output",
    type=_PATH,
    help="The file (comfyui, bfl) or folder (diffusers, modelopt) to write.  [default: CHECKPOINT's name and the "
    "layout's, beside it]",
)
@click.option("--from", "from_layout", type=_LAYOUT, help="The layout of a single file that does not say it itself.")
@LIKE
@click.option(
    "--calibration",
    type=_PATH,
    multiple=True,
    help="Amax values (.json) of fp4trt calibrate, for linears whose input has no scale.",
)
@click.option("--force", is_flag=True, help="Replace an existing result.")
def convert(
    checkpoint: str,
    to: str,
    output: Path | None,
    from_layout: str | None,
    like: Path | None,
    calibration: tuple[Path, ...],
    force: bool,
) -> Converted:
    """Write a quantized checkpoint in the layout of another program. Bytes are moved, nothing is rounded again.

    CHECKPOINT is a folder or a .safetensors file: of fp4trt or ModelOpt, of ComfyUI (BFL's and Comfy-Org's NVFP4 files
    too), or one that this command wrote. What --to modelopt writes is exported, validated and built like any other.

    \b
    comfyui    one file for ComfyUI; low-rank branches (SVDQuant) in OUTPUT-branch.safetensors, a LoRA to bypass
    diffusers  a folder for from_single_file(..., config=FOLDER, quantization_config=BFLQuantizationConfig())
    bfl        one file for the same, under the names of Black Forest Labs' own repository
    modelopt   a folder in ModelOpt's unified layout, fp4trt's own

    \b
    Example:
      fp4trt convert flux-fp4 --to comfyui -o ComfyUI/models/diffusion_models/flux-fp4.safetensors
      fp4trt convert flux1-dev-nvfp4.safetensors --to modelopt -o flux-fp4
      fp4trt convert flux2-dev-nvfp4-mixed.safetensors --to modelopt -o flux2-fp4 --calibration amax.json
    """
    from calibration.interchange.convert import convert as run
    from fp4trt.number_formats import linears_in_words

    result = run(
        checkpoint,
        output,
        to=to,
        from_layout=from_layout,
        like=like,
        calibration=calibration or None,
        force=force,
    )
    files = " and ".join(path for path in (result.output, result.branch) if path)
    layouts = f"from {result.layout_from} to {to}"
    click.echo(f"converted {linears_in_words(result.formats)} {layouts}: {result.bytes:,} bytes -> {files}")
    return result


@click.command()
@click.argument("files", metavar="FILE[:STRENGTH]...", nargs=-1, required=True)
@click.option("-o", "--output", type=_PATH, required=True, help="The safetensors file to write.")
@click.option("--checkpoint", type=_PATH, required=True, help="The quantized checkpoint that the graph was made of.")
@click.option("--rank", type=click.IntRange(0), help="Of the factors, padded with zeros.  [default: what is needed]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def lora(files: tuple[str, ...], output: Path, checkpoint: Path, rank: int | None, force: bool) -> LoraInputs:
    """Turn LoRA files into the inputs of a graph that was exported with --lora-rank.

    Several LoRAs add up; each may have a strength, 1 by default. The file holds an input for each slot, by name, in
    BF16, so that another LoRA needs no other engine.

    \b
    Example:
      fp4trt lora style.safetensors:0.8 -o style-inputs.safetensors --checkpoint flux-fp4
    """
    from calibration.lora_inputs import lora_inputs as run

    result = run(list(files), output, checkpoint=checkpoint, rank=rank, force=force)
    for beginning, count in result.left_out.items():
        click.echo(f"{count} keys are left out: {beginning}")
    click.echo(f"{result.linears} of {result.slots} slots are used, at lora_rank {result.rank} -> {output}")
    return result
