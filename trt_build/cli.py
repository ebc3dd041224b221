"""The `build` command."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp4trt.number_formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable

    from trt_build.builder import Built

__all__ = ["build_command"]

_STEPS = 1000
_EXAMPLE = """\b
Example:
  fp4trt build flux-fp4 --gpu rtx5090 --resolution 512:1024:1360 --batch 1:1:4 --text 512
  fp4trt build flux-fp4 --text 512 --profile "resolution=1024 batch=1" --profile "resolution=512 batch=4"
"""


@click.command("build", epilog=_EXAMPLE, short_help="Compile a graph into a TensorRT engine; no GPU needed.")
@click.argument("model", metavar="DIR|MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--gpu", default="rtx5090", show_default=True, help="GPU, or several: rtx5090,gb10.")
@click.option("--resolution", metavar="R", help="Pixels: 1024, 768x1360 or MIN:OPT:MAX.  [default: all allowed]")
@click.option(
    "--reference-images",
    metavar="N",
    help="Pictures of that size that the model reads too, as Kontext, FLUX.2 and Qwen-Image-Edit do: 1 or 0:1:2.  "
    "[default: none]",
)
@click.option("--batch", metavar="N", help="Images: 1 or MIN:OPT:MAX.  [default: all allowed]")
@click.option("--text", metavar="N", help="Text tokens: 512 or MIN:OPT:MAX.  [default: all allowed]")
@click.option("--frames", metavar="N", help="Frames of a video: 81 or MIN:OPT:MAX.  [default: all allowed]")
@click.option("--audio", metavar="N", help="Audio tokens: 126 or MIN:OPT:MAX.  [default: all allowed]")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX",
    help="Range of a symbolic dimension or, as 1x64:4x64:8x64, of an input; for third-party graphs.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="'KEY=VALUE ...'",
    help="One of several profiles in the engine. Keys are the options above without dashes; these hold for all that it "
    "does not say.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Engine file.  [default: GPU.engine beside the model]",
)
@click.option("--weight-streaming", is_flag=True, help="Let the runtime keep weights in host memory.")
@click.option("--allow-slow", is_flag=True, help="Build and publish even where FP4 is lost.")
@click.option("--force", is_flag=True, help="Replace an output, or build script, that is not as fp4trt wrote it.")
def build_command(model: Path, **options: Any) -> Built:
    """Build the engine of DIR/model.onnx or MODEL.onnx.

    The result is GPU.engine and, beside it, GPU.json: the request, its hashes, and the kernel of every
    linear. An unchanged request is answered from them without building. Exit status 1 when the lint refuses the
    graph, a linear that it promises in FP4 would run in 16 bit, or an attention in FP8 would fall apart.
    """
    from trt_build.builder import build

    def on_line(line: str) -> None:
        click.echo(line, err=True)

    with _progress_bar() as on_progress:
        result = build(model, on_progress=on_progress, on_line=on_line, **options)
    click.echo(_summary(result))
    for number, profile in enumerate(result.profiles):
        click.echo(f"  {_profile_line(number, profile)}")
    if branch := result.branch:
        what = f"low-rank branches of {branch['linears']} linears" if branch["linears"] else "smoothed inputs"
        click.echo(f"  {what}: {branch['bytes']:,} bytes, {branch['kernels']} of {result.kernels} kernels")
    if slots := result.lora:
        cost = f"{slots['kernels']} of {result.kernels} kernels"
        click.echo(f"  slots for LoRAs of {slots['linears']} linears: {cost}, lora_rank to {slots['max_rank']}")
    for item in result.lost:
        click.echo(f"  16 bit: {item['linear']}: {item['reason']}")
    for item in result.lost_attentions:
        click.echo(f"  not one kernel: {item['attention']}: {item['reason']}")
    if not result.quantized_linears:
        for reason, count in Counter(item["reason"] for item in result.sixteen_bit).items():
            click.echo(f"  16 bit: {count} linear{'s' if count > 1 else ''}: {reason}")
    return result


def _summary(result: Built) -> str:
    how = "unchanged, not built again" if result.cached else f"built in {result.seconds:.1f} s"
    size = result.engine_bytes / 1e6
    capabilities = ", ".join(result.compute_capabilities)
    promised = result.quantized_linears
    of_each = (
        f"{each['gemms']} {FORMATS[kind].gemm} GEMMs cover {each['linears']}" for kind, each in result.coverage.items()
    )
    covered = f"{' and '.join(of_each)} of {promised} quantized linears"
    coverage = covered if promised else "nothing promises FP4 GEMMs of this graph"
    if result.quantized_attentions:
        coverage += f", {result.fp8_attentions} of {result.quantized_attentions} attentions are one FP8 kernel each"
    several = f", {len(result.profiles)} profiles" if result.profiles else ""
    return f"{result.engine}: {size:.2f} MB for {capabilities}{several}, {how}; {coverage}"


def _profile_line(number: int, profile: Mapping[str, Any]) -> str:
    shapes = {name: ["x".join(map(str, shape)) for shape in extent] for name, extent in profile["shapes"].items()}
    sizes = profile["symbols"] or shapes
    extents = ", ".join(f"{name} {_extent(extent)}" for name, extent in sizes.items())
    gemms = " and ".join(f"{each['gemms']} {FORMATS[kind].gemm}" for kind, each in profile["coverage"].items())
    return f"profile {number}: {extents}; {gemms or 0} GEMMs, {profile['kernels']} kernels"


def _extent(values: Sequence[object]) -> str:
    return ":".join(map(str, values if len(set(values)) > 1 else values[:1]))


@contextmanager
def _progress_bar() -> Iterator[Callable[[float, str], None]]:
    """Yield an on_progress that draws a bar on stderr from its first call on, so that lines can go before it.

    It shows the seconds of the running phase: most of a build sits in one.
    """
    bar = click.progressbar(
        length=_STEPS,
        label="building",
        file=sys.stderr,
        show_eta=True,
        item_show_func=lambda item: item or "",
    )
    with ExitStack() as stack:
        began, running = 0.0, ""

        def on_progress(fraction: float, phase: str) -> None:
            nonlocal began, running
            if not running:
                stack.enter_context(bar)
            if phase != running:
                began, running = time.monotonic(), phase
            seconds = int(time.monotonic() - began)
            bar.update(int(fraction * _STEPS) - bar.pos, f"{phase} {seconds} s" if seconds else phase)
            bar.render_progress()  # update() draws nothing where the fraction stands still

        yield on_progress
