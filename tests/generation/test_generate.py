"""``fp4trt generate`` draws what the pipeline draws, by any artifact, with as little in memory as it can."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import fp4trt
from calibration.digits import DIRECTORY
from calibration.digits.description import DESCRIPTION
from calibration.digits.latents import decode
from calibration.digits.sampling import denoise
from calibration.pixel_space.sampling import noise
from generation.comparison.digit_classifier import load_classifier, with_channels
from generation.transformer import open_transformer
from tests.frame.diffusers_pipelines import save

SETTINGS: dict[str, Any] = {"steps": 2, "resolution": 32}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, this test's own."""
    monkeypatch.setenv("FP4TRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def flux_graph(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    fp4trt.export(pipeline / "transformer", path, precision="bf16")
    return path


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(float)


def in_diffusers(folder: Path, **call: Any) -> np.ndarray:
    """Return what the pipeline in a folder draws by itself, of the first seed."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, **call}
    return np.asarray(pipe(generator=torch.Generator().manual_seed(0), **settings).images[0]).astype(float)


def held() -> list[Any]:
    """Return the transformers that are in memory."""
    return [module for module in gc.get_objects() if issubclass(type(module), diffusers.FluxTransformer2DModel)]


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(20 * np.log10(255) - 10 * np.log10(np.square(one - other).mean() + 1e-9))


def test_the_built_in_model_s_graph_draws_digits_without_the_transformer_in_torch(
    quantized_built_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: Any, **_: Any) -> Any:
        raise AssertionError("a checkpoint was loaded into torch")

    monkeypatch.setattr("generation.transformer.load", refuse)
    monkeypatch.setattr("generation.transformer.load_source", refuse)
    known = {id(module) for module in held()}
    command = ["generate", str(quantized_built_in / "model.onnx"), "-o", str(tmp_path / "digits.png"), "--seed", "5"]
    assert fp4trt.run([*command, "-p", "seven", "--count", "3", "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    made = [module for module in held() if id(module) not in known]
    assert all(parameter.is_meta for module in made for parameter in module.parameters())
    assert [Path(file).name for image in images for file in image["files"]] == [f"digits-{i}.png" for i in range(3)]
    monkeypatch.undo()
    drawn = torch.from_numpy(np.stack([pixels(image["files"][0]) for image in images])).float() / 255
    start = noise(DESCRIPTION, 1, 6)
    *_, last = denoise(open_transformer(quantized_built_in), [7], start, dtype=torch.bfloat16)
    assert psnr(drawn[1].numpy() * 255, decode(last.latents)[0].numpy() * 255) > 30
    classifier = load_classifier(DIRECTORY / "classifier.safetensors")
    assert classifier(with_channels(drawn)).argmax(1).tolist() == [7, 7, 7]


def test_a_checkpoint_and_a_graph_draw_the_pipeline_s_picture_to_the_same_bytes_part_by_part(
    pipeline: Path, flux_graph: Path, tmp_path: Path
) -> None:
    stock = in_diffusers(pipeline, prompt="a dog")
    whole = fp4trt.generate(pipeline, tmp_path / "whole.png", prompts=["a cat", "a dog"], count=2, **SETTINGS)
    parts = fp4trt.generate(
        pipeline,
        tmp_path / "parts.png",
        prompts=["a cat", "a dog"],
        count=2,
        low_vram=True,
        embeddings_cache=False,
        **SETTINGS,
    )
    for one, other in zip(whole.images, parts.images, strict=True):
        assert Path(one["files"][0]).read_bytes() == Path(other["files"][0]).read_bytes()
    assert [(image["prompt"], image["seed"]) for image in whole.images][1:3] == [("a cat", 1), ("a dog", 0)]
    assert (pixels(whole.images[2]["files"][0]) == stock).all()
    (graph,) = fp4trt.generate(
        flux_graph, tmp_path / "graph.png", prompts="a dog", pipeline=pipeline, **SETTINGS
    ).images
    assert psnr(pixels(graph["files"][0]), stock) > 40


def test_embeddings_come_from_the_cache_without_the_text_encoders(
    pipeline: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fp4trt.generate(pipeline, tmp_path / "one.png", prompts="a cat", **SETTINGS)
    again = fp4trt.generate(pipeline, tmp_path / "two.png", prompts="a cat", **SETTINGS)
    assert (first.text_encoders_loaded, again.text_encoders_loaded, again.embeddings_from_cache) == (1, 0, 1)
    assert "text embeddings are taken from the cache" in capsys.readouterr().err
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    (kept,) = (cache / "embeddings").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    damaged = fp4trt.generate(pipeline, tmp_path / "three.png", prompts="a cat", **SETTINGS)
    assert damaged.text_encoders_loaded == 1
    assert "is damaged; its text embeddings are computed again" in capsys.readouterr().err
    other = shutil.copytree(pipeline, tmp_path / "other")
    with (other / "tokenizer" / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert fp4trt.generate(other, tmp_path / "four.png", prompts="a cat", **SETTINGS).text_encoders_loaded == 1


def test_a_picture_s_file_says_how_it_was_made(pipeline: Path, flux_graph: Path, tmp_path: Path) -> None:
    fp4trt.generate(flux_graph, tmp_path / "cat.png", prompts="a cat", pipeline=pipeline, seed=3, **SETTINGS)
    with Image.open(tmp_path / "cat.png") as picture:
        said, line = json.loads(picture.info["fp4trt"]), picture.info["parameters"]
    assert (said["prompt"], said["seed"], said["steps"], said["guidance"]) == ("a cat", 3, 2, 3.5)
    assert said["model"]["hashes"].keys() == {"graph"}
    assert line.startswith("a cat\nSteps: 2, CFG scale: 3.5, Seed: 3, Size: 32x32, Model: graph")
    assert str(tmp_path) not in json.dumps(said)
    assert fp4trt.inspect(tmp_path / "cat.png")["prompt"] == "a cat"


def test_a_pipeline_of_the_hub_draws_without_its_transformer_s_weights(
    pipeline: Path, flux_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "hub" / "models--someone--flux"
    left_out = shutil.ignore_patterns("diffusion_pytorch_model.safetensors")
    shutil.copytree(pipeline, folder / "snapshots" / "4d7a", ignore=left_out)
    shutil.copytree(pipeline / "vae", folder / "snapshots" / "4d7a" / "vae", dirs_exist_ok=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("4d7a")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for index, place in enumerate((pipeline, "someone/flux")):
        fp4trt.generate(flux_graph, tmp_path / f"{index}.png", prompts="a cat", pipeline=place, **SETTINGS)
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "FluxFillPipeline"])
def test_pictures_go_into_the_pipelines_that_read_them(
    name: str, pipeline: Path, flux_graph: Path, tiny_flux: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "pipe"
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("transformer"))
    tiny_flux(folder / "transformer", **({"in_channels": 132, "out_channels": 64} if "Fill" in name else {}))
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
    (folder / "model_index.json").write_text(json.dumps(index))
    noisy = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    Image.fromarray(noisy).save(tmp_path / "in.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given: dict[str, Any] = {"mask": tmp_path / "mask.png"} if "Fill" in name else {}
    run = {"pipeline": folder, "prompts": "a cat", "image": tmp_path / "in.png", **given, **SETTINGS}
    fp4trt.generate(folder / "transformer" if "Fill" in name else flux_graph, tmp_path / "out.png", **run)
    own = {"mask_image": Image.fromarray(mask)} if given else {"max_area": 32 * 32, "_auto_resize": False}
    stock = in_diffusers(folder, prompt="a cat", image=Image.fromarray(noisy), **own)
    assert psnr(pixels(tmp_path / "out.png"), stock) > 40


def test_a_video_is_an_animation_and_has_its_sound_beside_it(tmp_path: Path) -> None:
    save("LTX-2", tmp_path / "ltx2")
    result = fp4trt.generate(tmp_path / "ltx2", tmp_path / "v.png", prompts="a cat", frames=5, guidance=1, **SETTINGS)
    assert [Path(file).name for file in result.images[0]["files"]] == ["v.png", "v.wav"]
    with Image.open(tmp_path / "v.png") as video:
        assert (video.n_frames, json.loads(video.info["fp4trt"])["frames"]) == (5, 5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no prompt was given"),
        (["-p", "a cat", "--image", "cat.png"], "is a FluxPipeline, which reads no picture: leave it out"),
        (["-p", "a cat", "--frames", "5"], "which draws pictures: leave it out"),
        (["-p", "a cat", "--negative-prompt", "a dog"], "heeds none where --true-cfg-scale is not above 1"),
        (["-p", "a cat", "--resolution", "big"], "--resolution big is not a size in pixels"),
        (["-p", "a cat", "--lora", "gone.safetensors"], "gone.safetensors does not exist"),
        (["-p", "a cat", "--pipeline", "gone"], "gone does not exist; expected the folder of a diffusers pipeline"),
        (["-p", "a cat", "-o", "cat.jpg"], "-o cat.jpg is a .jpg file; expected one of .png, .webp, or a folder"),
        (["-p", "a cat", "--pipeline", "gone", "-o", f"{__file__}/cat.png"], "test_generate.py is not a folder"),
        (["-p", "a cat", "--fps", "24"], "is a FluxPipeline, which draws no video: leave it out"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    given: list[str], said: str, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fp4trt.run(["generate", str(pipeline), "-o", str(tmp_path / "out.png"), *given]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("option", ["--transformer-2", "--fps"])
def test_the_built_in_model_refuses_what_only_pipelines_take(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", "digits", "-p", "one", option, "3", "-o", str(tmp_path / "out.png")]
    assert fp4trt.run(given) == 2
    assert f"{option} was given, but" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
