"""Pipelines of every family, sampled with their own parts: what reaches the transformer, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fp4trt
from calibration.by_block.calibration import METADATA
from calibration.formats.attention_amax import operands_of
from calibration.inputs.captured import load_inputs
from calibration.inputs.prompts import Sampling
from fp4trt.errors import BadInputs, BadOption
from fp4trt.families import family_named, family_of
from fp4trt.json_file import load_json
from generation.comparison.pipeline import pipeline_sampler
from tests.frame.diffusers_models import MODELS

PICTURE = ("--pictures", "PICTURE")
VIDEO = ("--resolution", "32", "--frames", "5")


@dataclass(frozen=True)
class Case:
    """What sampling a prompt in two steps makes of a pipeline.

    Attributes:
        calls: of the transformer.
        sizes: of the graph's dimensions, by which every input has its shape.
        options: of the command, besides.
        part: the transformer's folder.
        needs: a package.
    """

    calls: int
    sizes: Mapping[str, int]
    options: Sequence[str] = ("--resolution", "32")
    part: str = "transformer"
    needs: str = "transformers"


# 32 x 32 pixels are 16 x 16 tokens by a VAE that halves nothing, 8 x 8 by one that halves once, 4 x 4 by Wan's. The
# picture of 96 x 64 is scaled to a megapixel (19 x 13 tokens by halving five times) or to 640 x 640 (12 x 8).
CASES = {
    "FLUX.2 dev": Case(2, {"B": 1, "L": 64 + 24 * 16, "T": 512}, ("--resolution", "32", *PICTURE)),
    "FLUX.2 klein": Case(4, {"B": 1, "L": 64, "T": 512}),
    "FLUX.3": Case(4, {"B": 1, "L": 4, "T": 80}),
    "FLUX.3 distilled": Case(2, {"B": 1, "L": 4, "T": 80}),
    "Qwen-Image": Case(2, {"B": 1, "L": 64, "T": 11}),
    "Qwen-Image-Edit": Case(2, {"B": 1, "L": 1 + 19 * 13, "T": 21}, ("--resolution", "64", *PICTURE)),
    "Qwen-Image-Edit-2511": Case(2, {"B": 1, "L": 1 + 19 * 13, "T": 24}, ("--resolution", "64", *PICTURE)),
    "Qwen-Image-Layered": Case(2, {"B": 1, "L": 6 * 12 * 8, "T": 11}, ("--resolution", "640", *PICTURE)),
    "Z-Image": Case(4, {"B": 1, "L": 256, "T": 32}),
    "Krea 2": Case(2, {"B": 1, "L": 64, "T": 514}, ("--resolution", "32", "--guidance", "0")),
    "SD3": Case(2, {"B": 2, "L": 256, "T": 77 + 256}),
    "Chroma": Case(4, {"B": 1, "L": 256, "T": 512}),
    "Wan 2.2 A14B": Case(2, {"B": 1, "L": 2 * 16, "T": 512}, VIDEO, "transformer_2"),
    "Wan 2.2 A14B I2V": Case(2, {"B": 1, "L": 2 * 16, "T": 512}, (*VIDEO, *PICTURE), needs="ftfy"),
    "Wan 2.2 TI2V-5B": Case(4, {"B": 1, "L": 2 * 16, "T": 512}, VIDEO),
    "Wan 2.2 TI2V-5B of a picture": Case(4, {"B": 1, "L": 2 * 16, "T": 512}, (*VIDEO, *PICTURE), needs="ftfy"),
    "LTX-2": Case(2, {"B": 2, "L": 3 * 16, "T": 1024, "A": 5}, VIDEO),
    "LTX-2.3": Case(2, {"B": 2, "L": 3 * 16, "T": 1024, "A": 5}, VIDEO),
}
Calibrate = Callable[..., int]


@pytest.fixture
def calibrate(tmp_path: Path) -> Calibrate:
    """Return what calibrates the transformer of a pipeline on a prompt."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    known = {"PICTURE": str(tmp_path / "large.png"), "SMALL": str(tmp_path / "small.png")}
    Image.fromarray(noise, "RGB").save(known["PICTURE"])
    Image.fromarray(noise[:48], "RGB").save(known["SMALL"])

    def run(folder: Path, *options: str) -> int:
        given = ["-o", str(tmp_path / "amax.json"), "--prompts", str(tmp_path / "prompts.txt")]
        return fp4trt.run(["calibrate", str(folder), *given, *(known.get(option, option) for option in options)])

    return run


def saved(name: str, tmp_path: Path) -> Path:
    pytest.importorskip(CASES[name].needs)
    from tests.frame.diffusers_pipelines import save

    save(name, tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("name", CASES)
def test_what_a_pipeline_gives_its_transformer_is_what_the_graph_takes(
    name: str, calibrate: Calibrate, tmp_path: Path
) -> None:
    case, kept = CASES[name], tmp_path / "inputs.safetensors"
    folder = saved(name, tmp_path) / case.part
    assert calibrate(folder, "--steps", "2", *case.options, "--save-inputs", str(kept)) == 0
    config = load_json(folder / "config.json")
    family = family_of(config)
    found = json.loads((tmp_path / "amax.json").read_text())
    assert sorted(found) == sorted([METADATA, *family.quantized(config), *operands_of(family.fp8_attentions(config))])
    assert all(value > 0 for path, value in found.items() if path != METADATA)
    calls = load_inputs(kept)
    assert len(calls) == case.calls
    wanted = {
        key: tuple(case.sizes.get(size, size) for size in shape) for key, shape in family.input_shapes(config).items()
    }
    for call in calls:
        assert {key: tuple(value.shape) for key, value in call.items()} == wanted
    times = [float(call["timestep"].max()) for call in calls]
    assert times == sorted(times, reverse=name != "Z-Image")  # whose time runs from 0 (noise) on


REFUSED: dict[str, tuple[str, str, Sequence[str], str]] = {
    "a picture to edit": ("QwenImageEditPipeline", "qwen-image", (), "reads pictures beside prompts; give --pictures"),
    "a picture to continue": ("WanImageToVideoPipeline", "wan-i2v", (), "reads pictures beside prompts; give --pictu"),
    "no picture": ("WanPipeline", "wan", PICTURE, "is a WanPipeline, which reads no pictures; leave out --pictures"),
    "references": ("Flux3ModularPipeline", "flux3", PICTURE, "which reads no pictures; leave out --pictures"),
    "frames": ("Krea2Pipeline", "krea2", ("--frames", "5"), "which draws pictures: leave it out"),
    "guidance": ("QwenImagePipeline", "qwen-image", ("--guidance", "2.5"), "--guidance 2.5 was given, but"),
    "sides": ("LTX2Pipeline", "ltx2", ("--resolution", "80"), "draws multiples of 32 pixels: give 96"),
    "two sides": (
        "QwenImageLayeredPipeline", "qwen-image-layered", ("--resolution", "512", *PICTURE),
        "draws 640 or 1024 pixels alone",
    ),
    "a small picture": (
        "Flux2Pipeline", "flux2", ("--pictures", "SMALL"),
        "has 96 x 48 pixels; a Flux2Pipeline reads pictures of 64 x 64 at least",
    ),
    "another class": (
        "QwenImageControlNetPipeline", "qwen-image", (),
        "LTX2Pipeline: capture what its transformer is given yourself (docs/models.md), and give that as --inputs",
    ),
    "a processor": ("Flux2KleinPipeline", "flux2", (), "has a Qwen2VLProcessor, which needs torchvision; install"),
    "a package": ("WanImageToVideoPipeline", "wan-i2v", PICTURE, "which needs ftfy; install the package ftfy"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_pipeline_does_not_take_is_told_before_anything_is_loaded(
    what: str,
    calibrate: Calibrate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, model, options, words = REFUSED[what]
    for package in ("torchvision", "ftfy"):
        monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    config = {"_class_name": MODELS[model].class_name, **MODELS[model].config}
    (folder / "config.json").write_text(json.dumps(config))
    index = "modular_model_index.json" if "Modular" in name else "model_index.json"
    parts = {"processor": ["transformers", "Qwen2VLProcessor"]} if what == "a processor" else {}
    (folder.parent / index).write_text(json.dumps({"_class_name": name, **parts}))
    assert calibrate(folder.parent, *options) == 2
    printed = capsys.readouterr().err.strip()
    assert words in printed
    assert "\n" not in printed


def test_settings_of_a_pipeline_are_refused_where_none_is_sampled(five_calls: Path, tmp_path: Path) -> None:
    for more in ({}, {"inputs": five_calls}):
        with pytest.raises(BadInputs, match="--frames 5 was given, but no pipeline is sampled"):
            fp4trt.calibrate("digits", tmp_path / "amax.json", frames=5, **more)
    with pytest.raises(BadOption, match="guidance is -1; expected a number, 0 at least"):
        fp4trt.calibrate("digits", tmp_path / "amax.json", guidance=-1)


def test_a_transformer_that_is_never_called_is_told(
    calibrate: Calibrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("Wan 2.2 A14B", tmp_path)
    assert calibrate(folder / "transformer_2", "--steps", "1", *VIDEO) == 2  # at the noisiest timestep
    assert (
        "pipe never called its transformer_2; expected a call at least: sample more --steps" in capsys.readouterr().err
    )
    with pytest.raises(BadInputs, match="is a WanPipeline; images are compared of one of: FluxPipeline, "):
        pipeline_sampler(folder / "transformer", family_named("wan"), ["a cat"], 1, Sampling())


def test_a_modular_pipeline_without_a_part_is_told(
    calibrate: Calibrate, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved("FLUX.3", tmp_path)
    shutil.rmtree(folder / "tokenizer")
    assert calibrate(folder, "--steps", "1", "--resolution", "32") == 2
    assert "pipe lacks tokenizer/, which prompts need" in capsys.readouterr().err
