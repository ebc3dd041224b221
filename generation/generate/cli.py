"""The command ``fp4trt generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["generate"]

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("artifact", metavar="DIR|ONNX|ENGINE")
@click.option(
    "-o", "--output", type=_PATH, required=True, help="NAME.png or NAME.webp, of several NAME-0.png ...; or a folder."
)
@click.option("-p", "--prompt", "prompts", multiple=True, help="What to draw; repeat it for more.")
@click.option("--prompts", "prompts_file", type=_PATH, metavar="FILE", help="A text file, one prompt a line.")
@click.option("--pipeline", metavar="DIR|HUB_ID", help="Text encoders and VAE.  [default: the pipeline around DIR]")
@click.option("--transformer-2", type=_PATH, metavar="ARTIFACT", help="The second transformer, of Wan 2.2 A14B.")
@click.option("--negative-prompt", metavar="TEXT", help="What not to draw.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of a prompt's first picture.")
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Pictures of each prompt.")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the pipeline's own]")
@click.option("--guidance", type=click.FloatRange(0), help="Scale of the guidance.  [default: the pipeline's own]")
@click.option("--true-cfg-scale", type=click.FloatRange(0), help="Scale of FLUX.1's and Qwen-Image's negative prompt.")
@click.option("--image", type=_PATH, multiple=True, help="A picture to edit, refer to, or be led by; repeatable.")
@click.option("--mask", type=_PATH, help="White where to fill.  [default: NAME.mask.png, or what is transparent]")
@click.option("--resolution", metavar="N|WxH", help="Pixels of the sides.  [default: the pipeline's own]")
@click.option("--frames", type=click.IntRange(1), help="Of a video.  [default: the pipeline's own]")
@click.option("--fps", type=click.FloatRange(0, min_open=True), help="Frames a second that a video's file says.")
@click.option(
    "--lora", multiple=True, metavar="FILE[:STRENGTH]", help="A LoRA, into slots or plain weights; repeatable."
)
@click.option(
    "--teacache", type=_PATH, metavar="FILE|DIR", help="Leave out steps as `fp4trt teacache` found; see its docs."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: cuda where there is one]")
@click.option("--low-vram", is_flag=True, help="Text encoders, transformer and decoding one after the other.")
@click.option(
    "--embeddings-cache/--no-embeddings-cache", default=True, help="Keep text embeddings on disk.  [default: yes]"
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
def generate(artifact: str, output: Path, **options: Any) -> Any:
    """Draw pictures or videos with a checkpoint, a graph (in ONNX Runtime) or an engine (on its GPU).

    Of the pipeline all but its transformer is used, and text encoders only where a prompt's embeddings are not in the
    cache yet. Picture i of a prompt has the noise of seed + i, as diffusers draws it. Each file says how it was made.

    \b
    Example:
      fp4trt generate digits-fp4/model.onnx -p seven --count 10 -o digits.png
      fp4trt generate flux-fp4/model.onnx --pipeline FLUX.1-dev -p "a cat" --steps 28 -o cat.png
      fp4trt generate kontext.engine --pipeline FLUX.1-Kontext-dev -p "at night" --image cat.png -o night.png
    """
    from generation.generate.generate import generate as run

    result = run(artifact, output, **options)
    for image in result.images:
        width, height = image["size"]
        shown, *others = image["files"]
        more = f" and {len(others)} more" if others else ""
        click.echo(f"{shown}{more}: '{image['prompt']}', seed {image['seed']}, {width} x {height}")
    return result
