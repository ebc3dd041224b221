"""Options of the verbs in Python: what one does not take is refused by name, in one line, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fp4trt
from fp4trt.errors import BadGraph, BadInputs, BadOption, BadRecipe
from fp4trt.progress import Step
from fp4trt.verb import verb

Call = Callable[[], Any]

REFUSED: dict[str, tuple[Call, type[Exception], str]] = {
    "level": (
        lambda: fp4trt.validate("m.onnx", level="bogus"),
        BadOption,
        "level is 'bogus'; expected one of: full, blocks",
    ),
    "no images": (
        lambda: fp4trt.compare("digits", {"a": "a"}, "out", images=0),
        BadOption,
        "images is 0; expected a whole number, 1 at least",
    ),
    "no steps": (lambda: fp4trt.compare("digits", {"a": "a"}, "out", steps=0), BadOption, "steps is 0; expected"),
    "half a picture": (lambda: fp4trt.compare("digits", {"a": "a"}, "out", images=1.5), BadOption, "images is 1.5"),
    "seeds as a word": (
        lambda: fp4trt.compare("digits", {"a": "a"}, "out", seeds="12"),
        BadOption,
        "seeds is '12'; expected whole numbers from 0 to 2^64 - 1 in a list",
    ),
    "one seed": (lambda: fp4trt.compare("digits", {"a": "a"}, "out", seeds=12), BadOption, "seeds is 12"),
    "a large seed": (lambda: fp4trt.compare("digits", {"a": "a"}, "out", seeds=[1 << 64]), BadOption, "seeds is"),
    "no names": (lambda: fp4trt.compare("digits", "a", "out"), BadOption, "checkpoints is 'a'; expected a mapping"),
    "of": (
        lambda: fp4trt.search("digits", "out", 0.1, of="x"),
        BadOption,
        "of is 'x'; expected one of: both, flops, bytes",
    ),
    "no calls": (lambda: fp4trt.search("digits", "out", 0.1, calls=0), BadOption, "calls is 0; expected"),
    "budget": (lambda: fp4trt.search("digits", "out", "x"), BadInputs, "the budget is 'x'; expected a number"),
    "quantize's device": (
        lambda: fp4trt.quantize("digits", "out", device="gpu"),
        BadInputs,
        "there is no device 'gpu'; expected one of: cpu, cuda",
    ),
    "calibrate's device": (
        lambda: fp4trt.calibrate("digits", "out", device="gpu"),
        BadInputs,
        "there is no device 'gpu'",
    ),
    "search's device": (lambda: fp4trt.search("digits", "out", 0.1, device=None), BadInputs, "there is no device None"),
    "calibrate's steps": (lambda: fp4trt.calibrate("digits", "out", steps=0), BadOption, "steps is 0; expected"),
    "resolution": (lambda: fp4trt.calibrate("digits", "out", resolution=8), BadOption, "resolution is 8; expected"),
    "no precision": (lambda: fp4trt.export("d", precision=None), BadGraph, "precision is None; expected one of: nvfp4"),
    "precision": (lambda: fp4trt.export("d", precision="fp4"), BadGraph, "precision is 'fp4'; expected one of: nvfp4"),
    "scale dtype": (lambda: fp4trt.export("d", scale_dtype="half"), BadGraph, "scale_dtype is 'half'; expected one of"),
    "a number as recipe": (lambda: fp4trt.quantize("digits", "out", recipe=5), BadRecipe, "the recipe is 5; expected"),
    "a number as data": (lambda: fp4trt.quantize("digits", "out", calibration=5), BadOption, "calibration is 5; exp"),
    "no name": (
        lambda: fp4trt.quantize("digits", ""),
        BadOption,
        "output is ''; expected the name of a file or folder",
    ),
    "no source": (lambda: fp4trt.calibrate(None, "out"), BadOption, "source is None; expected the name of a file"),
    "layout": (
        lambda: fp4trt.convert("flux-fp4", to="gguf"),
        BadOption,
        "to is 'gguf'; expected one of: comfyui, diffusers, bfl, modelopt",
    ),
    "no gpu": (lambda: fp4trt.build("m.onnx", gpu=None), BadOption, "gpu is None; expected 'rtx5090', or several"),
    "no such program": (
        lambda: fp4trt.package("m.onnx", "out", program="comfy"),
        BadOption,
        "program is 'comfy'; expected one of: rtx-demo, demo-diffusion, bfl, onnxruntime, hub",
    ),
    "no package": (
        lambda: fp4trt.package("m.onnx", program="bfl"),
        BadOption,
        "a package for bfl is a folder; name it with --output",
    ),
    "no shapes": (lambda: fp4trt.build("m.onnx", shapes=None), BadOption, "shapes is None; expected 'B=1:1:4'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_option_does_not_take_is_refused_before_any_work(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, error, words = REFUSED[what]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as refused:
        call()
    assert str(refused.value).startswith(words)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


@verb
def _example(source: str, output: str, *, recipe: str = "ptq", force: bool = False) -> tuple[str, str, str, bool]:
    return source, output, recipe, force


def test_an_option_by_position_works_for_one_more_version() -> None:
    with pytest.warns(FutureWarning, match="_example: give recipe by name"):
        assert _example("a", "b", "quality", force=True) == ("a", "b", "quality", True)  # type: ignore[call-arg, misc]


@pytest.mark.parametrize(
    ("given", "named", "words"),
    [
        (("a", "b", "quality"), {"recipe": "ptq"}, "got multiple values for argument 'recipe'"),
        (("a", "b", "quality", True, 5), {}, "takes 4 arguments, but 5 were given"),
    ],
)
def test_no_argument_is_dropped(given: tuple[Any, ...], named: dict[str, Any], words: str) -> None:
    call: Any = _example
    with pytest.raises(TypeError, match=words):
        call(*given, **named)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (fp4trt.export, "is a graph; name the one to write with output"),
        (
            lambda graph: fp4trt.export(graph, "ours", precision="bf16"),
            "precision is for checkpoints, and .* is a graph",
        ),
        (lambda graph: fp4trt.export(graph, "ours", copy_weights=True), "copy_weights is for checkpoints"),
        (lambda graph: fp4trt.export(graph.parent, allow_slow=True), "allow_slow is for a third-party graph"),
        (lambda graph: fp4trt.export(graph, "ours"), "is empty"),
    ],
)
def test_export_takes_a_third_partys_graph_as_the_command_does(call: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.onnx").touch()
    with pytest.raises(BadGraph, match=words):
        call(tmp_path / "theirs.onnx")


def test_lint_and_inspect_give_results_that_read_as_what_the_command_prints(quantized_digits: Path) -> None:
    graph = quantized_digits / "model.onnx"
    steps: list[Step] = []
    with pytest.warns(FutureWarning, match="lint: give allow_slow by name"):
        linted = fp4trt.lint(graph, True)
    assert (linted["passed"], linted["allow_slow"], dict(linted)) == (True, True, linted.as_dict())
    found = fp4trt.inspect(graph, progress=steps.append)
    assert (found.kind, found["family"], dict(found)) == ("onnx", "flux-digits", found.as_dict())
    with pytest.raises(TypeError, match="does not support item assignment"):
        found["kind"] = "other"
    assert fp4trt.inspect(quantized_digits, against="digits")["passed"]
    with pytest.raises(BadOption, match="dtype is 'bf16'; expected torch"):
        fp4trt.load(quantized_digits, dtype="bf16")
    with pytest.warns(FutureWarning, match="load: give dtype by name"):
        fp4trt.load(quantized_digits, torch.float32, progress=steps.append)
