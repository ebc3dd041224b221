"""`benchmarks/flux_dev.py` on a tiny real pipeline: drawn, killed, resumed, measured and reported."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a cat", "a dog", "a cat a dog", "cat", "dog")
RECIPES = ("nvfp4-ptq", "nvfp4-quality")
TINY = ("--steps", "2", "--resolution", "32", "--text-tokens", "16", "--calibration-prompts", "2", "--device", "cpu")

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def flux_dev(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import flux_dev

    return flux_dev


@pytest.fixture
def run(flux_dev: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Return what runs the script in this process; it gives the status and what it told on stderr."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["flux_dev.py", *map(str, words)])
        capfd.readouterr()
        return flux_dev.main(), capfd.readouterr().err

    return call


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


_KILLED = """
import os, signal, sys
from pathlib import Path
from PIL import Image
sys.path.insert(0, "benchmarks")
import flux_dev

save = Image.Image.save
count = 0


def save_half_and_die(self, path, **options):
    global count
    count += 1
    if count == 5:
        Path(path).write_bytes(b"half a picture")
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, path, **options)


Image.Image.save = save_half_and_die
sys.exit(flux_dev.main())
"""


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(np.float64)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_a_killed_run_resumes_and_reports_what_the_images_say(
    pipeline: Path, prompts: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    recipes = [word for recipe in RECIPES for word in ("--recipe", recipe)]
    command = [pipeline, "--prompts", prompts, "--count", 3, *TINY, *recipes, "-o", out]
    status, said = warm_python.run(_KILLED, *command)
    assert status == -signal.SIGKILL, said
    assert "3 models of 3 images each: 9 to draw; about 0.00" in said
    before = {path: path.stat().st_mtime_ns for path in out.glob("images/*/*.png")}
    assert len(before) == 4
    assert len(list(out.glob("images/nvfp4-ptq/*.partial"))) == 1

    status, told = run(*command)
    assert status == 0, told
    assert "5 to draw, 4 are there" in told
    assert "quantizing" not in told
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration", "checkpoints", "flux_dev.html", "flux_dev.json", "images", "settings.json",
    ]  # fmt: skip

    _check_data(out, told)
    _check_page(out)
    _check_against_the_pipeline(pipeline, out)

    drawn = {path.name: path.read_bytes() for path in out.glob("images/nvfp4-ptq/*.png")}
    shutil.rmtree(out / "images" / "nvfp4-ptq")
    data = (out / "flux_dev.json").read_bytes()
    status, told = run(*command, "--offload")
    assert status == 0, told
    assert {path.name: path.read_bytes() for path in out.glob("images/nvfp4-ptq/*.png")} == drawn
    assert not list(out.glob("images/*/*.safetensors"))
    assert (out / "flux_dev.json").read_bytes() == data

    _check_refusals_of_a_folder(command, run, out, pipeline)


def _check_data(out: Path, told: str) -> None:
    data = json.loads((out / "flux_dev.json").read_text())
    asked = [image["prompt"] for image in data["images"]]
    captured = (out / "calibration" / "prompts.txt").read_text().splitlines()
    assert len(asked) == 3
    assert sorted([*asked, *captured]) == sorted(PROMPTS)
    assert data["recipes"] == {recipe: recipe for recipe in RECIPES}
    for recipe in RECIPES:
        errors = []
        for image in data["images"]:
            one, other = (pixels(out / "images" / label / image["file"]) for label in ("bf16", recipe))
            errors.append(-10 * np.log10(((one - other) ** 2).mean() / 255**2))
            assert image[recipe]["psnr_db"] == pytest.approx(errors[-1])
        assert data["checkpoints"][recipe]["psnr_db"]["mean"] == pytest.approx(np.mean(errors))
        assert np.mean(errors) < 80
    (pair,) = data["differences"]
    assert (pair["of"], pair["to"]) == ("nvfp4-quality", "nvfp4-ptq")
    assert pair["psnr_db"]["low"] < pair["psnr_db"]["mean"] < pair["psnr_db"]["high"]
    assert {row["method"]: row["lpips"] for row in data["published"]["rows"]}["NVFP4, SVDQuant + GPTQ"] == 0.203
    alike = {one["what"]: one["alike"] for one in data["published"]["alike"]}
    assert (alike["guidance"], alike["denoising steps"], alike["prompts"], alike["FID"]) == (True, False, False, False)
    measured = {metric["title"] for metric in data["metrics"].values()}
    for title in ("LPIPS", "ImageReward", "CLIP-IQA", "CLIP score"):
        assert title in measured or f"{title} is left out: {data['unavailable'][title]}" in told


def _check_page(out: Path) -> None:
    page = (out / "flux_dev.html").read_text(encoding="utf-8")
    images = json.loads((out / "flux_dev.json").read_text())["images"]
    near = {f"<p>{one['prompt']} <small>": sum(one[recipe]["psnr_db"] for recipe in RECIPES) for one in images}
    assert sorted(near, key=page.index) == sorted(near, key=near.__getitem__)
    for expected in (
        "width=device-width",
        "data:image/jpeg;base64,",
        "Difference to nvfp4-ptq, paired",
        "0.203",
        "a cat",
    ):
        assert expected in page
    for outside in ("src='http", 'src="http', "<link", "<script"):
        assert outside not in page


def _check_against_the_pipeline(folder: Path, out: Path) -> None:
    """Hold the baseline's images to what the whole pipeline draws."""
    import torch
    from diffusers import FluxPipeline

    whole = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    for image in json.loads((out / "flux_dev.json").read_text())["images"]:
        (drawn,) = whole(
            image["prompt"], num_inference_steps=2, height=32, width=32, guidance_scale=3.5, max_sequence_length=16,
            generator=torch.Generator().manual_seed(image["seed"]),
        ).images  # fmt: skip
        assert np.array_equal(np.asarray(drawn), pixels(out / "images" / "bf16" / image["file"]))


def _check_refusals_of_a_folder(command: list[Any], run: Run, out: Path, pipeline: Path) -> None:
    status, told = run(*command, "--steps", "3")
    assert status == 2
    assert "holds images with steps 2, and this run has 3; choose another --output" in told
    status, told = run(*command, "--count", "4")
    assert status == 2
    assert "was captured on prompts that are evaluated on now; lower --count" in told
    status, told = run(*command, "--recipe", out / "checkpoints" / "nvfp4-ptq")
    assert status == 2
    assert "is the second one named nvfp4-ptq" in told
    manifest = out / "checkpoints" / "nvfp4-ptq" / "fp4trt.json"
    manifest.write_text(manifest.read_text() + " ")
    status, told = run(*command)
    assert status == 2
    assert "images/nvfp4-ptq holds images of another checkpoint" in told


def test_the_choice_of_prompts_and_noise_is_deepcompressors(flux_dev: Any, tmp_path: Path) -> None:
    from protocol.prompts import chosen

    names = [f"{number * 7919 % 1009:04x}" for number in range(100)]
    path = tmp_path / "meta_data.json"
    path.write_text(json.dumps({name: {"category": "art", "prompt": f"prompt {name}"} for name in names}))
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    choice = chosen(path, 10)
    assert sorted(one.name for one in choice.asked) == sorted(shuffled[:10])
    assert [one.name for one in choice.spare[:3]] == shuffled[:-4:-1]
    assert {one.name for one in choice.asked} < {one.name for one in chosen(path, 20).asked}
    assert len(chosen(path, None).asked) == 100
    # the hash of a name that public runs of theirs were seeded with, by its definition
    value = 0
    for letter in choice.asked[0].name:
        value = (value * 31 + ord(letter)) % (10**9 + 7)
    assert choice.asked[0].seed == value


def test_bad_input_is_refused_in_one_line_before_anything_is_drawn(
    pipeline: Path, prompts: Path, run: Run, tmp_path: Path
) -> None:
    def refused(source: Path, listed: Path, *words: object) -> str:
        command = [source, "--prompts", listed, *TINY, "-o", tmp_path / "out", "--recipe", "nvfp4-ptq", *words]
        status, told = run(*command)
        assert status == 2
        assert not (tmp_path / "out").exists()
        (line,) = [line for line in told.splitlines() if line.startswith("flux_dev: error: ")]
        return line

    def listed(text: str) -> Path:
        (tmp_path / "meta_data.json").write_text(text)
        return tmp_path / "meta_data.json"

    assert "does not exist; expected a text file, one prompt a line" in refused(pipeline, tmp_path / "none.txt")
    assert "holds 5 prompts, and --count asks for 6" in refused(pipeline, prompts, "--count", 6)
    assert "leaves 1 prompts that are not evaluated on, and calibration takes 2" in refused(
        pipeline, prompts, "--count", 4
    )
    assert "'b' has no prompt; expected MJHQ-30K's" in refused(pipeline, listed('{"b": {"category": "art"}}'))
    assert "meta_data.json holds no prompt" in refused(pipeline, listed("{}"))
    assert "meta_data.json is not JSON" in refused(pipeline, listed("{"))
    assert "there is no recipe 'best'" in refused(pipeline, prompts, "--count", 3, "--recipe", "best")
    assert "holds no NVFP4 weights" in refused(pipeline, prompts, "--count", 3, "--recipe", pipeline / "transformer")
    assert "--calibration nothing is not a file" in refused(pipeline, prompts, "--calibration", "nothing")
    assert "is not in a pipeline" in refused(shutil.copytree(pipeline / "transformer", tmp_path / "alone"), prompts)
    kontext = shutil.copytree(pipeline, tmp_path / "kontext")
    index = kontext / "model_index.json"
    index.write_text(index.read_text().replace("FluxPipeline", "FluxKontextPipeline"))
    assert "is a FluxKontextPipeline; expected a FluxPipeline" in refused(kontext, prompts)


def test_without_arguments_it_says_what_it_is(run: Run) -> None:
    assert run() == (0, "")
