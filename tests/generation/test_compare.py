"""`fp4trt compare`: the same prompts and noise through the reference and several checkpoints."""

from __future__ import annotations

import errno
import importlib.machinery
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fp4trt
from calibration.by_block.calibration import calibrate
from calibration.checkpoints.quantized import load
from calibration.digits.model import load_transformer
from calibration.quantization import quantize
from fp4trt.publish import replacing
from generation.comparison import compare as comparing
from generation.comparison.compare import compare
from generation.comparison.digits import compare as compare_digits
from generation.comparison.grid import draw_grid
from generation.comparison.perceptual import perceptual_metrics
from tests import warm_python

SMALL = ("--images", "10", "--steps", "2", "--seeds", "1000,1001")


@pytest.fixture(scope="module")
def quantized_digits(quantized_built_in: Path) -> Path:
    """The whole built-in model, which draws digits."""
    return quantized_built_in


@pytest.fixture(scope="module")
def good(quantized_digits: Path) -> Path:
    return quantized_digits


@pytest.fixture(scope="module")
def rougher(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worse checkpoint: calibrated to an eighth of what the inputs become."""
    folder = tmp_path_factory.mktemp("rougher")
    measured = json.loads((good / "fp4trt.json").read_text())["amax"]
    reduced = {name.removesuffix(".input_quantizer"): v / 8 for name, v in measured.items() if ".input" in name}
    (folder / "amax.json").write_text(json.dumps(reduced))
    quantize("digits", folder / "rougher", calibration=folder / "amax.json")
    return folder / "rougher"


def arguments(output: Path, **checkpoints: Path) -> list[str]:
    return ["compare", "digits", *(f"{name}={path}" for name, path in checkpoints.items()), "-o", str(output), *SMALL]


@pytest.fixture(scope="module")
def result(good: Path, rougher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "result"
    assert fp4trt.run(arguments(folder, good=good, bad=rougher)) == 0
    return folder


def test_the_command_says_the_worse_checkpoint_is_worse_in_every_figure(result: Path) -> None:
    data = json.loads((result / "compare.json").read_text())
    assert set(data["metrics"]) == {"psnr_db", "ssim", "velocity_error", "frechet", "recognised"}
    (pair,) = data["differences"]
    assert (pair["of"], pair["to"]) == ("bad", "good")
    for key, sign in {"psnr_db": -1, "ssim": -1, "velocity_error": 1}.items():
        bounds = (pair[key]["low"], pair[key]["high"])
        assert min(sign * bound for bound in bounds) > 0, (key, bounds)
        apart = data["checkpoints"]["bad"][key]["mean"] - data["checkpoints"]["good"][key]["mean"]
        assert pair[key]["mean"] == pytest.approx(apart)
        assert len(data["checkpoints"]["bad"][key]["per_seed"]) == 2
    times = [point["time"] for point in data["checkpoints"]["good"]["velocity_error_by_time"]]
    assert times == [1.0, 0.5]
    assert data["reference"]["recognised"]["mean"] > 0.5


def test_the_command_measures_what_the_models_give_in_memory(result: Path, good: Path) -> None:
    models = {"good": load(good, dtype=torch.float32)}
    there = compare_digits(load_transformer(), models, (1000, 1001), 10, steps=2)
    found = json.loads((result / "compare.json").read_text())["checkpoints"]["good"]
    for key in ("psnr_db", "velocity_error", "frechet", "recognised"):
        assert found[key]["per_seed"] == pytest.approx(there.estimate("good", key).per_seed, rel=1e-9)


def test_the_report_is_one_file_with_its_pictures_inside(result: Path) -> None:
    assert sorted(path.name for path in result.iterdir()) == ["compare.html", "compare.json", "grid.png"]
    page = (result / "compare.html").read_text(encoding="utf-8")
    for expected in ("data:image/png;base64,", "<svg", "image PSNR", "Difference to good, paired", "class='worse'"):
        assert expected in page
    for outside in ('src="http', "src='http", "<link", "<script src", "http:", "https:", str(result.parent)):
        assert outside not in page
    assert str(result.parent) not in (result / "compare.json").read_text()
    with Image.open(result / "grid.png") as picture:
        assert picture.size[1] == 28 + 5 * 68  # the reference, and two rows for each checkpoint


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_and_needs_force(
    result: Path, good: Path, rougher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = shutil.copytree(result, tmp_path / "again")
    before = {path.name: path.read_bytes() for path in again.iterdir()}
    assert fp4trt.run(arguments(again, good=good, bad=rougher)) == 2
    assert "replace it with --force" in capfd.readouterr().err
    assert fp4trt.run([*arguments(again, good=good, bad=rougher), "--force"]) == 0
    out = capfd.readouterr().out
    assert "difference to good, paired" in out
    assert {path.name: path.read_bytes() for path in again.iterdir()} == before


_KILLED = """
import os, signal, sys
from generation.comparison.store import Store
import fp4trt

keep = Store.keep
count = 0


def keep_and_die(self, *arguments):
    global count
    keep(self, *arguments)
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)


Store.keep = keep_and_die
sys.exit(fp4trt.run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.slow
def test_a_killed_comparison_takes_over_its_finished_pairs(
    result: Path, good: Path, rougher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = arguments(tmp_path / "result", good=good, bad=rougher)
    status, printed = warm_python.run(_KILLED, *command)
    assert status == -9, printed
    drawn = []
    follow = comparing.follow
    monkeypatch.setattr(comparing, "follow", lambda *given: drawn.append(given[2]) or follow(*given))
    monkeypatch.setattr(comparing, "load_source", lambda *_: pytest.fail("the reference was drawn again"))
    assert fp4trt.run(command) == 0
    assert "resuming: 3 of 4 pairs" in capfd.readouterr().err
    assert drawn == [1001]
    for name in ("compare.json", "compare.html", "grid.png"):
        assert (tmp_path / "result" / name).read_bytes() == (result / name).read_bytes()
    assert not (tmp_path / "result.partial").exists()


def test_what_does_not_fit_is_refused_in_one_line(
    good: Path, tiny_flux: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(*words: str) -> str:
        assert fp4trt.run(["compare", *SMALL, "-o", str(tmp_path / "out"), *words]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        return line

    named = f"good={good}"
    assert "is not NAME=CHECKPOINT" in refused("digits", str(good))
    assert "the name 'good' is given twice" in refused("digits", named, named)
    assert "holds no NVFP4 weights" in refused("digits", f"plain={tiny_flux(tmp_path / 'flux')}")
    assert "attention_head_dim 64, the source 16" in refused(str(tmp_path / "flux"), named)
    assert "--resolution is of a pipeline" in refused("digits", named, "--resolution", "32")
    assert "each seed once" in refused("digits", named, "--seeds", "3,3")
    assert "is not a list of seeds" in refused("digits", named, "--seeds", "3;4")
    assert "is quantized already" in refused(str(good), named)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text('{"mine": 1}')
    assert "which fp4trt did not write" in refused("digits", named, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux", "out"]


def test_without_matplotlib_all_but_what_it_draws_is_there(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Blocked(importlib.machinery.PathFinder):
        """Finds neither matplotlib nor what imports it: torchmetrics does where its metadata are there."""

        @classmethod
        def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
            return None if fullname.partition(".")[0] == "matplotlib" else super().find_spec(fullname, path, target)

    for name in [name for name in sys.modules if name.partition(".")[0] in ("matplotlib", "torchmetrics")]:
        monkeypatch.delitem(sys.modules, name)
    finders = [Blocked if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
    monkeypatch.setattr(sys, "meta_path", finders)
    command = ["compare", "digits", f"good={good}", "-o", str(tmp_path / "out")]
    assert fp4trt.run([*command, "--images", "10", "--steps", "1", "--seeds", "5,6"]) == 0
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        del sys.modules[name]  # what was imported of it before it failed
    told = capfd.readouterr().err
    assert "matplotlib is not installed, so compare.html has no plot: pip install 'fp4trt[report]'" in told
    assert "SSIM is left out: a package is not installed: pip install matplotlib" in told
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "matplotlib is not installed" in page
    assert 'class="plot"' not in page
    assert "<th>1.000</th>" in page


def test_a_full_disk_is_told_with_the_file_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def unfit() -> str:
        with pytest.raises(OSError, match="No space left on device") as told, replacing(tmp_path / "out", force=False):
            draw_grid(torch.zeros(1, 8, 8), {"a": torch.zeros(1, 8, 8)}, ["a"], tmp_path / "out.partial" / "grid.png")
        assert list(tmp_path.iterdir()) == []
        return Path(told.value.filename).name

    monkeypatch.setattr(Image.Image, "save", full)
    assert unfit() == "grid.png.partial"
    monkeypatch.setattr(Path, "write_text", full)
    assert unfit() == ".fp4trt-partial"


@pytest.mark.parametrize("images", [1, 2])
def test_a_figure_that_so_few_images_do_not_give_is_left_out(
    images: int, good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = compare("digits", {"good": good}, tmp_path / "out", images=images, steps=1, seeds=(5,))
    why = f"it needs 3 images of each seed, {images} asked for"
    assert found["unavailable"] == {"Frechet distance": why}
    assert "frechet" not in found["checkpoints"]["good"]
    assert f"Frechet distance is left out: {why}" in capfd.readouterr().err


def test_words_choose_the_digits(good: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("seven\nthree\n")
    given = {"prompts": tmp_path / "words.txt", "images": 3, "steps": 1, "seeds": (5,)}
    found = compare("digits", {"good": good}, tmp_path / "out", **given)
    assert (found["prompts"], found["images_per_seed"], found["differences"]) == (["seven", "three"], 3, [])


def test_a_pipelines_images_are_compared_through_the_pipeline(
    pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    calibrate(pipeline, tmp_path / "amax.json", prompts=prompts, steps=2, resolution=32)
    quantize(pipeline, tmp_path / "fp4", calibration=tmp_path / "amax.json")
    command = ["compare", str(pipeline), f"fp4={tmp_path / 'fp4'}", "-o", str(tmp_path / "out")]
    settings = ["--prompts", str(prompts), "--steps", "3", "--resolution", "32", "--seeds", "1,2", "--images", "3"]
    assert fp4trt.run(command) == 2
    assert "needs prompts to draw" in capfd.readouterr().err
    assert fp4trt.run([*command, *settings]) == 0
    told = capfd.readouterr().err
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["computed_in"] == "bfloat16"
    assert found["images_per_seed"] == 3
    row = found["checkpoints"]["fp4"]
    assert 0.001 < row["velocity_error"]["mean"] < 0.5
    assert len(row["velocity_error_by_time"]) == 3
    assert 10 < row["psnr_db"]["mean"] < 120
    for title, reason in found["unavailable"].items():
        assert f"{title} is left out: {reason}" in told
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.mode == "RGB"


def test_a_metric_that_cannot_be_had_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("generation.comparison.perceptual.CLIP", "nobody/has-this-model")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    found, missing = perceptual_metrics()
    assert found == []
    assert set(missing) == {"LPIPS", "ImageReward", "CLIP-IQA", "CLIP score", "Frechet distance (Inception)"}
    for reason in missing.values():
        assert "\n" not in reason
        assert reason.startswith(("a package is not installed: pip install", "its weights are not on disk: "))
    clip = (
        "its weights are not on disk: nobody/has-this-model in the hub's cache; run: hf download nobody/has-this-model"
    )
    assert missing["CLIP score"] == clip
