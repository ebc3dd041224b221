"""Image quality of quantized FLUX.1 against BF16, by the protocol of deepcompressor's published table; wants one GPU.

Draws the same prompts from the same noise through a diffusers pipeline with the BF16 transformer and with each
quantized one, computed in torch by fake quantization, and says how far apart the images are: PSNR, SSIM, LPIPS,
ImageReward, CLIP-IQA, CLIP score and Frechet distance, each where its package and weights are on this machine. A recipe
is quantized first, calibrated on prompts of the same file that are not evaluated on.

Everything is kept under -o: a run that was killed resumes with the first image that is missing, and a larger --count
or one more --recipe draws only what is new.

example: python benchmarks/flux_dev.py FLUX.1-dev --prompts meta_data.json --count 1024 --recipe nvfp4-ptq
--recipe nvfp4-quality -o build/flux-dev
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from protocol.album import Album, saved
from protocol.drawing import Pace, Painter, Settings, Texts, space_for
from protocol.models import BASELINE, Data, Model, Source, data_of, make, models_of, needs_data, space_for_making
from protocol.prompts import Asked, chosen
from protocol.published import likenesses
from protocol.report import Found, printed, write_page
from protocol.scoring import compared

from calibration.by_block.measure_amax import require_device
from calibration.checkpoints.plain import find_source, refuse_quantized
from calibration.inputs.prompts import Sampling, pipeline_of
from fp4trt.errors import BadInputs, OutputExists, TooLittleSpace
from fp4trt.families import family_of
from fp4trt.folder_lock import alone
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import PIPELINE
from fp4trt.progress import note, on_terminal
from fp4trt.publish import write_json

SETTINGS = "settings.json"
"""Tells a folder of ours, and how its images were drawn."""
DATA = "flux_dev.json"
PAGE = "flux_dev.html"
FORMAT = "fp4trt flux_dev 1"
VERSIONED = ("torch", "diffusers", "transformers")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of a FLUX.1 pipeline in BF16")
    parser.add_argument("--prompts", type=Path, required=True, help="one a line, or MJHQ-30K's meta_data.json")
    parser.add_argument("--count", type=_whole, help="how many of them; all by default")
    parser.add_argument("--recipe", action="append", required=True, help="a recipe, or the folder of a checkpoint")
    parser.add_argument("--baseline", choices=["bf16"], default="bf16", help="what is compared to")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of images, checkpoints and report")
    parser.add_argument("--steps", type=_whole, default=50, help="denoising steps (50)")
    parser.add_argument("--guidance", type=float, default=3.5, help="of the distilled guidance (3.5)")
    parser.add_argument("--resolution", type=_side, default=1024, help="pixels of a side (1024)")
    parser.add_argument("--text-tokens", type=_whole, default=512, help="length of T5's input (512)")
    parser.add_argument("--calibration", type=Path, help="captured inputs or amax, instead of drawing some")
    parser.add_argument("--calibration-prompts", type=_whole, default=4, help="that recipes calibrate on (4)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="where to draw and to quantize (cuda)"
    )
    parser.add_argument(
        "--offload", action="store_true", help="decode at the end, when the transformer is off the card"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON; all else goes to stderr")
    return parser


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 at least")
    return int(text)


def _side(text: str) -> int:
    value = _whole(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16, as the sides of FLUX.1's pictures are")
    return value


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Draw what is missing, measure, write the report and print the tables; return what JSON holds."""
    require_device(given.device)
    source = source_of(given.checkpoint)
    choice = chosen(given.prompts, given.count)
    settings = Settings(given.steps, given.guidance, given.resolution, given.text_tokens)
    out: Path = given.output
    wanted = models_of(source, given.recipe, out / "checkpoints")
    sampling = Sampling(given.steps, given.resolution)
    data = data_of(given.calibration, choice, given.calibration_prompts, sampling, out / "calibration")
    if any(needs_data(source, model) for model in wanted):
        data.require()
    computed = environment(given.device)
    with claimed(out, {**settings.as_dict(), **computed, "weights": wanted[0].identity()}):
        albums = [Album(model.label, out / "images" / model.label) for model in wanted]
        draw(given, source, choice.asked, settings, wanted, albums, data)
        comparison = compared(albums[0], albums[1:], choice.asked)
        described = {
            "format": FORMAT,
            "settings": settings.as_dict(),
            "computed_with": computed,
            "prompts": {"file": choice.file, "holds": choice.total, "count": len(choice.asked)},
            "baseline": BASELINE,
            "recipes": {model.label: model.recipe_name for model in wanted[1:]},
            "calibrated_on": data.described,
        }
        alike = likenesses(choice, settings, data.described)
        found = Found(comparison, choice.asked, albums, described, alike)
        result = found.as_dict()
        saved(out / DATA, lambda path: write_json(path, result))
        write_page(found, out / PAGE)
    print(printed(found))
    print(f"\nall of it is in {out}; open {(out / PAGE).resolve()}")
    return result


def draw(
    given: argparse.Namespace,
    source: Source,
    asked: Sequence[Asked],
    settings: Settings,
    wanted: Sequence[Model],
    albums: Sequence[Album],
    data: Data,
) -> None:
    """Make the checkpoints and draw the images that are missing, one model in memory at a time."""
    missing = {album.label: len(album.missing(asked)) for album in albums}
    needed = space_for(sum(missing.values()), max(missing.values()), settings, source.config["joint_attention_dim"])
    needed += space_for_making(source, wanted, data, (settings.resolution // 16) ** 2, settings.text_tokens)
    say_what_is_to_do(given.output, missing, len(asked), needed)
    for model in wanted:
        make(source, model, data, given.device)
    texts = Texts(given.output / "texts", settings.text_tokens)
    painter = Painter(source.root, settings, texts, given.device, given.offload)
    pace = Pace(missing)
    for model, album in zip(wanted, albums, strict=True):
        keep_to_one_checkpoint(album.folder, model.identity())
        texts.encode(source.root, album.missing(asked), given.device)
        painter.draw(album, asked, model.load, pace)
    shutil.rmtree(texts.folder, ignore_errors=True)


def source_of(checkpoint: str) -> Source:
    """Return the plain checkpoint in a pipeline of FLUX.1 that draws from prompts alone.

    Raises:
        BadCheckpoint, BadInputs, UnknownFamily: it is another thing.
    """
    folder = find_source(checkpoint)
    config = load_json(folder / "config.json")
    refuse_quantized(folder, config)
    family = family_of(config, folder)
    root = pipeline_of(folder)
    name = load_json(root / PIPELINE).get("_class_name")
    if name != "FluxPipeline":
        raise BadInputs(f"{root} is a {name}; expected a FluxPipeline, as FLUX.1-dev is")
    return Source(root, folder, config, family)


def environment(device: str) -> dict[str, str]:
    """Return what else decides about the last bits of an image."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, **{package: importlib.metadata.version(package) for package in VERSIONED}}


@contextlib.contextmanager
def claimed(out: Path, decides: Mapping[str, Any]) -> Iterator[None]:
    """Lock a folder for this command alone; it holds images of one source drawn in one way.

    Raises:
        OutputExists: it is another's, or holds images that were drawn in another way.
    """
    with alone(out):
        mark = out / SETTINGS
        if mark.is_file():
            there = load_json(mark)
            for key in decides:
                if there.get(key) != decides[key]:
                    raise OutputExists(
                        f"{out} holds images with {key} {json.dumps(there.get(key))}, and this run has "
                        f"{json.dumps(decides[key])}; choose another --output"
                    )
        elif out.exists() and (not out.is_dir() or any(path.name != f"{SETTINGS}.partial" for path in out.iterdir())):
            raise OutputExists(f"{out} is there and holds no run of this script; choose another --output")
        else:
            saved(mark, lambda path: write_json(path, decides))
        yield


def keep_to_one_checkpoint(folder: Path, identity: str) -> None:
    """Refuse images that another checkpoint of the same name drew.

    Raises:
        OutputExists: naming the folder.
    """
    mark = folder / "checkpoint.json"
    if not mark.is_file():
        saved(mark, lambda path: write_json(path, {"identity": identity}))
    elif load_json(mark).get("identity") != identity:
        raise OutputExists(f"{folder} holds images of another checkpoint; remove it, or choose another --output")


def say_what_is_to_do(out: Path, missing: Mapping[str, int], count: int, needed: int) -> None:
    """Say how many images are to be drawn, and what of the disk that takes.

    Raises:
        TooLittleSpace: there is not as much.
    """
    images = sum(missing.values())
    there = f", {len(missing) * count - images} are there" if images < len(missing) * count else ""
    free = shutil.disk_usage(out).free
    has = f"about {needed / 1e9:.2f} GB of disk, {free / 1e9:.0f} GB are free"
    note(f"{len(missing)} models of {count} images each: {images} to draw{there}; {has}")
    if free < needed:
        raise TooLittleSpace(f"{out} needs {has}; make room, or lower --count")
    if images:
        note("how long that takes is said after the first images of each model")


def main() -> int:
    if len(sys.argv) == 1:
        options().print_help()
        return 0
    given = options().parse_args()
    try:
        with on_terminal(), contextlib.redirect_stdout(sys.stderr if given.json else sys.stdout):
            result = run(given)
    except KeyboardInterrupt:
        print("flux_dev: error: interrupted; the same command resumes", file=sys.stderr)
        return 2
    except Exception as error:
        status = getattr(error, "exit_code", 2 if isinstance(error, OSError) else None)
        if status is None:
            raise
        print(f"flux_dev: error: {' '.join(str(error).split())}", file=sys.stderr)
        return status
    if given.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
