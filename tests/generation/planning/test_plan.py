"""The verb and the command: sources of every kind, what is told of them, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import fp4trt
from fp4trt.errors import (
    BadCheckpoint,
    BadOption,
    BadProfileError,
    BadRecipe,
    OutputExists,
    UnknownFamily,
    UnknownGpuError,
    UnsupportedFormatError,
)
from fp4trt.single_files.config import published_config
from fp4trt.single_files.tables import SINGLE_FILES
from fp4trt.targets import TARGETS
from generation.planning.advice import changes_for
from generation.planning.call import Model, call_of
from generation.planning.rows import make_row
from generation.planning.source import read_source
from generation.planning.weights import plain_weights
from tests.frame.diffusers_models import MODELS

GIB = 1 << 30


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_planned_from_its_config_alone(name: str, tmp_path: Path) -> None:
    config = {**MODELS[name].config, "_class_name": MODELS[name].class_name}
    if name == "chroma":
        config["patch_size"] = 1  # which is there in the config of a saved model
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = fp4trt.plan(tmp_path / "config.json", gpu="rtx5070")
    forms = {form["name"]: form for form in plan.forms}
    assert forms["bf16"]["checkpoint_bytes"] == 2 * plan.parameters
    assert forms["nvfp4-quality"]["weights_bytes"] < forms["fp8-ptq"]["weights_bytes"] < forms["bf16"]["weights_bytes"]
    for form in plan.forms:
        resident, on_demand, streaming = (mode["peak_bytes"] for mode in form["modes"].values())
        assert resident >= on_demand >= streaming > plan.runtime_bytes
        assert form["activation_bytes"] > 0
        assert form["least_seconds_of_a_call"] > 0
    usual = ("without nvfp4-quality-r32: method.rank is 32", "mxfp8-ptq: MXFP8 is stored in 8 bits, unpacked and mul")
    left_out = [note for note in plan.notes[2:] if not note.startswith(usual)]
    assert plan.notes[:2] + left_out == [  # no published model is as narrow as these
        "the size of text encoders, VAE is not known: peaks are without it",
        "the VAE's class is not known: its workspace is taken to be AutoencoderKL's",
    ]


@pytest.mark.parametrize("name", [name for table in SINGLE_FILES.values() for name in table.published])
def test_what_runs_beside_a_published_model_is_known(name: str) -> None:
    source = read_source(name)
    unknown = [part.name for part in source.components if part.elements is None]
    assert unknown == (["connectors"] if name == "LTX-2.3" else [])
    assert [part.stage for part in source.components][:1] == ["encode"]
    assert sum(part.decoder is not None and part.decoder.known for part in source.components) == 1
    assert source.transformers == (2 if name == "Wan 2.2 I2V A14B" else 1)


def test_text_encoders_of_flux2_go_by_the_width_of_the_text(tmp_path: Path) -> None:
    config = published_config("FLUX.2")
    assert config is not None
    found = {}
    for width in (15360, 7680, 12288, 99):
        (tmp_path / "config.json").write_text(json.dumps({**config, "joint_attention_dim": width}), encoding="utf-8")
        found[width] = read_source(tmp_path).components[0].name
    assert found == {15360: "Mistral Small 3 24B", 7680: "Qwen3 4B", 12288: "Qwen3 8B", 99: "text encoders"}


@pytest.fixture
def pipeline(digits: Path, tmp_path: Path) -> Path:
    """The folder of a pipeline: a T5 in FP32, an encoder of which the index alone is there, and a VAE in BF16."""
    config = json.loads((digits / "config.json").read_text())
    folder = tmp_path / "pipeline"
    parts = {"text_encoder": "T5EncoderModel", "text_encoder_2": "Qwen3Model", "vae": "AutoencoderKL"}
    index = {"_class_name": "FluxPipeline", "scheduler": ["diffusers", "X"], "transformer": ["diffusers", "Y"]}
    files = {"model_index.json": {**index, **{name: ["x", kind] for name, kind in parts.items()}}}
    files["transformer/config.json"] = config
    files["text_encoder/config.json"] = {"architectures": ["T5EncoderModel"]}
    files["text_encoder_2/config.json"] = {"architectures": ["Qwen3Model"], "dtype": "float32"}
    total = {"metadata": {"total_size": 4000}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
    files["text_encoder_2/model.safetensors.index.json"] = total
    files["vae/config.json"] = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 512]}
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    t5 = {
        "encoder.block.0.layer.1.DenseReluDense.wo.weight": np.zeros((3, 4), np.float32),
        "x": np.zeros(5, np.float16),
    }
    save_file({**t5, "codes": np.zeros(7, np.uint8)}, folder / "text_encoder" / "model.safetensors")
    save_file({"decoder.weight": np.zeros(11, np.float16)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_pipelines_own_components_are_counted_as_they_are_loaded(pipeline: Path) -> None:
    source = read_source(pipeline)
    sizes = {part.name: (part.nbytes(), part.nbytes(fp16=True)) for part in source.components}
    assert sizes == {
        "text_encoder (T5EncoderModel)": (2 * 17 + 7, 2 * 17 + 7 + 2 * 12),  # in FP16 a T5's wo stays in FP32
        "text_encoder_2 (Qwen3Model)": (2000, 2000),
        "vae (AutoencoderKL)": (22, 44),
    }
    assert source.components[-1].decoder is not None
    assert source.components[-1].decoder.elements(pixels=100, frames=1) == 512 * 100


def test_two_transformers_are_resident_together_and_on_demand_apart(pipeline: Path) -> None:
    one = fp4trt.plan(pipeline).forms[0]
    (pipeline / "transformer_2").mkdir()
    (pipeline / "transformer_2" / "config.json").write_text((pipeline / "transformer" / "config.json").read_text())
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "transformer_2": ["diffusers", "Y"]}))
    two = fp4trt.plan(pipeline / "transformer_2").forms[0]
    more = {mode: two["modes"][mode]["peak_bytes"] - one["modes"][mode]["peak_bytes"] for mode in two["modes"]}
    assert more == {"resident": one["weights_bytes"], "on_demand": 0, "streaming": 0}


def test_a_single_file_and_a_quantized_checkpoint_are_sources(digits: Path, quantized_digits: Path) -> None:
    file = digits / "diffusion_pytorch_model.safetensors"
    from_file, from_folder = fp4trt.plan(file, like=digits), fp4trt.plan(digits)
    assert from_file.forms == fp4trt.plan(file).forms == from_folder.forms  # with the config.json beside it
    stored = fp4trt.plan(quantized_digits)
    assert (stored.chosen, stored.forms[0]["name"]) == ("stored", "stored")
    sizes = {form["name"]: form["weights_bytes"] for form in stored.forms}
    assert sizes["stored"] == sizes["nvfp4-quality"]
    assert fp4trt.plan(quantized_digits / file.name).forms == stored.forms


def test_a_name_on_the_hub_is_read_from_the_cache(
    digits: Path, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_snapshot: Callable[..., Path]
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for inside in ("", "transformer", "vae", "text_encoder", "text_encoder_2"):
        names = [path.name for path in (pipeline / inside).iterdir() if path.is_file()]
        hub_snapshot(pipeline / inside, tmp_path / "hub", names, inside)
    weights = "diffusion_pytorch_model.safetensors"
    hub_snapshot(digits, tmp_path / "hub", [weights])
    refs = tmp_path / "hub" / "models--a--b" / "refs"
    refs.mkdir()
    (refs / "main").write_text("4d7a")
    assert fp4trt.plan("a/b").components == fp4trt.plan(pipeline).components
    assert fp4trt.plan(f"a/b/{weights}", like=digits).forms == fp4trt.plan(digits).forms
    with pytest.raises(BadCheckpoint, match=r"a/b/other\.gguf is neither a file here nor"):
        fp4trt.plan("a/b/other.gguf")
    with pytest.raises(BadCheckpoint, match="nor in the hub's cache, and the hub cannot be reached"):
        fp4trt.plan("a/nothing")


def test_where_it_does_not_fit_the_smallest_change_comes_first() -> None:
    smaller, by_loading = fp4trt.plan("Z-Image", gpu="rtx5080", resolution=1280, recipe="nvfp4-ptq").changes
    assert 960 <= smaller["width"] == smaller["height"] < 1280
    assert smaller["change"] == f"nvfp4-ptq: --resolution {smaller['width']}x{smaller['width']}"
    assert (smaller["mode"], by_loading["mode"]) == ("resident", "on_demand")
    assert smaller["peak_bytes"] <= 16 * GIB

    changes = fp4trt.plan("Z-Image", gpu="rtx5080", recipe=["fp8-ptq", "nvfp4-ptq"]).changes
    assert [change["change"] for change in changes] == [
        "fp8-ptq: low VRAM (each component loaded for its stage)",
        "nvfp4-ptq: all components resident",
    ]
    (without_text,) = fp4trt.plan("FLUX.1", gpu="rtx5060", recipe="nvfp4-ptq").changes
    assert without_text["change"] == (
        "nvfp4-ptq: low VRAM, weight streaming (fp4trt build --weight-streaming), text encoders on the CPU"
    )
    close, certain = fp4trt.plan("FLUX.1", gpu="rtx5070", recipe="nvfp4-ptq").changes
    assert certain["change"] == f"{close['change']}, text encoders on the CPU"
    assert 0.9 * 12 * GIB < close["peak_bytes"] < 12 * GIB
    assert 1.1 * certain["peak_bytes"] < 12 * GIB
    fewer, by_loading = fp4trt.plan("Z-Image", gpu="rtx5090", resolution=2048, batch=4).changes
    assert (fewer["change"], fewer["batch"], fewer["width"]) == ("nvfp4-quality: --batch 2", 2, 2048)
    assert by_loading["change"] == "nvfp4-quality: low VRAM (each component loaded for its stage), --batch 3"
    assert fp4trt.plan("FLUX.1", gpu="rtx5090", recipe="nvfp4-ptq").changes == []


def test_where_nothing_helps_a_gpu_is_named() -> None:
    source, small = read_source("FLUX.1"), replace(TARGETS["rtx5070"], memory_gib=2)
    call = call_of(Model(source.family, source.config), {})
    row = make_row(source, plain_weights("bf16", source.family, source.config), call, small)
    (change,) = changes_for(source, row, [], replace(call, resizable=False), small, lambda *_: call)
    assert not change.fits
    assert change.change == (
        "a GPU of 8 GiB or more, such as rtx3050, for bf16, with low VRAM, weight streaming (fp4trt build "
        "--weight-streaming), text encoders on the CPU"
    )


def test_the_sizes_that_are_asked_for_count() -> None:
    video = read_source("Wan 2.2 TI2V 5B")
    model = Model(video.family, video.config)
    usual, more = call_of(model, {}), call_of(model, {"frames": "121", "batch": "2"})
    assert more.sizes["L"] * 21 == usual.sizes["L"] * 31
    assert more.activation_bytes() == pytest.approx(2 * 31 / 21 * usual.activation_bytes(), rel=0.02)
    squared = call_of(model, {"shapes": "L=8400"})  # of 21 frames of 20 x 20 tokens of 32 pixels
    assert (squared.sizes["L"], squared.width, squared.height, squared.resizable) == (8400, 640, 640, False)
    several = call_of(model, {"shapes": ("L=10000", "T=64"), "resolution": 640})  # beside pictures to refer to
    assert (several.sizes["L"], several.sizes["T"], several.width, several.resizable) == (10000, 64, 640, False)
    edit = read_source("Qwen-Image-Edit-2511")
    sizes = {"resolution": (1024, 768), "reference_images": 1, "text": 256}
    call = call_of(Model(edit.family, edit.config), sizes)
    assert (call.sizes["L"], call.sizes["T"], call.width, call.height) == (2 * 64 * 48, 256, 1024, 768)


REFUSED = {
    "no single file": (("a.safetensors",), BadCheckpoint, "a.safetensors does not exist; expected a single file there"),
    "an input": (("FLUX.1", "--shape", "img_ids=9x3"), BadProfileError, "--shape img_ids=...: a plan takes symbolic"),
    "no source": (("nowhere",), BadCheckpoint, "nowhere is not a folder or file here; expected a checkpoint"),
    "several GPUs": (("FLUX.1", "--gpu", "rtx5090,gb10"), UnknownGpuError, "a plan is for one GPU, got rtx5090, gb10"),
    "a range": (
        ("FLUX.1", "--batch", "1:1:4"),
        BadProfileError,
        "--batch 1:1:4: a plan is of one size; give the large",
    ),
    "a range of a shape": (("FLUX.1", "--shape", "L=1:2:3"), BadProfileError, "--shape L=1:2:3: a plan is of one size"),
    "fewer tokens": (
        ("FLUX.1", "--shape", "L=1024", "--resolution", "1024"),
        BadProfileError,
        "--shape L=1024: 1024x1024 alone is 4096 tokens",
    ),
    "two batches": (("FLUX.1", "--batch", "1", "--shape", "B=2"), BadProfileError, "--shape B=2: --batch says B, too"),
    "a recipe twice": (
        ("FLUX.1", "--recipe", "nvfp4-ptq", "--recipe", "nvfp4-ptq"),
        BadRecipe,
        "nvfp4-ptq: 'nvfp4-ptq' names another row of the plan",
    ),
    "no pictures": (("FLUX.1", "--batch", "0"), BadProfileError, "--batch 0: expected 1 or more"),
    "odd pixels": (("FLUX.1", "--resolution", "1000"), BadProfileError, "--resolution 1000: 1000 is not a multiple of"),
    "no such size": (("FLUX.1", "--frames", "5"), BadProfileError, "--frames 5: the model declares no such dimension"),
    "a format that the GPU lacks": (
        ("FLUX.1", "--gpu", "rtx4090", "--recipe", "nvfp4-ptq"),
        UnsupportedFormatError,
        "the graph is NVFP4, which rtx4090 (SM89) cannot compute",
    ),
    "no picture": (("FLUX.1", "-o", "plan.txt"), BadOption, "output is 'plan.txt'; expected a name that ends in .html"),
    "like": (("FLUX.1", "--like", "FLUX.1"), BadOption, "like is 'FLUX.1', which gives a single file its config"),
}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "is not JSON (Expecting value: line 1 column 1 (char 0)); expected a single file (.safetensors,"),
        ('{"_class_name": "UNet2DConditionModel"}', "describes a UNet2DConditionModel; expected one of: Chroma"),
        ('{"_class_name": "FluxTransformer2DModel"}', "in_channels is None, expected a whole number above 0"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_its_name(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises((BadCheckpoint, UnknownFamily), match=rf"^{re.escape(str(file))}:? {re.escape(words)}"):
        fp4trt.plan(file)


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_line(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, error, words = REFUSED[what]
    assert error.exit_code == 2  # type: ignore[attr-defined]
    assert fp4trt.run(["plan", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"fp4trt plan: error: {words}")
    assert err.count("\n") == 1


def test_the_command_fits_one_screen_and_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    page, image = tmp_path / "plan.html", tmp_path / "plan.png"
    arguments = ["plan", "Z-Image", "--gpu", "rtx4090"]
    assert fp4trt.run([*arguments, "-o", str(page)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines[:-1])) <= 120
    assert any(line.startswith("nvfp4-quality ") and line.endswith("no NVFP4 on SM89") for line in lines)
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert not any(outside in text for outside in ("<script", "<link", "src=", 'href="http'))
    assert lines[0] in text
    assert fp4trt.run([*arguments, "-o", str(image), "--json"]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert json.loads(capfd.readouterr().out)["picture"] == str(image)
    with pytest.raises(OutputExists, match="replace it with --force"):
        fp4trt.plan("Z-Image", output=page)
    assert sorted(tmp_path.iterdir()) == [page, image]


def test_the_documentation_shows_what_the_command_prints(capfd: pytest.CaptureFixture[str]) -> None:
    shown = (Path(fp4trt.__file__).parents[1] / "docs" / "planning.md").read_text(encoding="utf-8")
    assert fp4trt.run(["plan", "FLUX.1", "--gpu", "rtx5070"]) == 0
    assert f"\n```\n{capfd.readouterr().out}```\n" in shown
