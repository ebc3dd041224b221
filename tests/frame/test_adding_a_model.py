"""docs/adding-a-model.md, followed word for word; and what is said of a description that is wrong."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fp4trt
from calibration.by_block.runner import BlockRunner
from calibration.inputs.captured import warnings_of
from fp4trt import cli
from fp4trt.custom_model import CustomModel, _returning_tuples, save_checkpoint
from fp4trt.errors import BadModule, OutputExists
from fp4trt.families import custom, family_of
from fp4trt.json_file import load_json

GUIDE = Path(fp4trt.__file__).parents[1] / "docs" / "adding-a-model.md"


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder of its own, and forget the module again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(custom.VARIABLE, "")
    monkeypatch.setenv("PYTHONPATH", str(Path(fp4trt.__file__).parents[1]))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    custom._loaded.cache_clear()
    sys.modules.pop("my_model", None)


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def _written() -> None:
    (source,) = _blocks("python")
    Path("my_model.py").write_text(source, encoding="utf-8")


@pytest.mark.slow
def test_the_guide_leads_to_an_engine(capfd: pytest.CaptureFixture[str]) -> None:
    _written()
    save, road = _blocks("bash")
    subprocess.run([sys.executable, *shlex.split(save)[1:]], check=True)
    for line in road.splitlines():
        command, *words = shlex.split(line)
        assert command == "fp4trt"
        assert cli.run(words) == 0, line
    (built,) = re.findall(r"`(\d+ FP4 GEMMs cover \d+ of \d+ quantized linears)`", GUIDE.read_text(encoding="utf-8"))
    assert built in capfd.readouterr().out
    assert Path("denoiser-fp4/rtx5090.engine").stat().st_size > 1_000_000


def test_without_the_module_the_model_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    _written()
    subprocess.run([sys.executable, "my_model.py"], check=True)
    words = ["quantize", "denoiser", "-o", "out", "--calibration", "inputs.safetensors"]
    assert cli.run(words) == 2
    assert "or --module for a model of your own" in capsys.readouterr().err
    assert cli.run([*words, "--module", "my_model.py:denoiser", "--recipe", "nvfp4-ptq"]) == 0
    assert family_of(load_json(Path("denoiser/config.json"))).name == "denoiser"


WRONG = {
    "my_model": "the module is 'my_model'; expected package.file:function, such as my_model:denoiser",
    "nowhere:denoiser": "nowhere cannot be imported (ModuleNotFoundError: No module named 'nowhere')",
    "nowhere.py:denoiser": "nowhere.py cannot be imported (FileNotFoundError: there is no ",
    "my_model:nothing": "my_model has no function nothing",
    "my_model:Denoiser": "my_model:Denoiser returns a Denoiser; expected a fp4trt.custom_model.CustomModel",
    "my_model:Block": "my_model:Block raised TypeError: Block.__init__() missing 1 required positional argument",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_module_that_cannot_be_used_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _written()
    assert cli.run(["inspect", "denoiser", "--module", name]) == 2
    said = capsys.readouterr().err
    assert WRONG[name] in said
    assert said.count("\n") == 1


class _Two(nn.Module):
    """Runs one linear twice, and never another."""

    def __init__(self, backwards: bool = False, persistent: bool = True) -> None:
        super().__init__()
        self.backwards = backwards
        self.register_buffer("table", torch.zeros(1), persistent=persistent)
        self.twice, self.never, self.once = (nn.Linear(16, 16) for _ in range(3))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])
        self.more = nn.ModuleList([nn.Sequential(nn.Linear(16, 16))])
        self.bare = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.once(self.twice(self.twice(x)))
        lists = (self.more, self.blocks) if self.backwards else (self.blocks, self.more)
        return self.bare[0](lists[1][0](lists[0][0](x)))


def _model(**changed: Any) -> CustomModel:
    x = torch.zeros(2, 5, 16, dtype=torch.bfloat16)
    usual: dict[str, Any] = {
        "name": "two", "make": _Two, "inputs": {"x": x}, "axes": {"x": ("B", "L", None)},
        "outputs": {"y": ("B", "L", None)}, "sizes": {"B": (1, 1, 4), "L": (1, 5, 9)}, "linears": ["once", "blocks.*"],
        "blocks": ["blocks"],
    }  # fmt: skip
    return CustomModel(**{**usual, **changed})


def test_calls_of_more_than_the_model_declares_are_told_of() -> None:
    family = _model().family()
    calls = [{"x": torch.zeros(8, size, 16, dtype=torch.bfloat16)} for size in (9, 12)]
    assert warnings_of(calls[:1], family, {}) == []
    (told,) = warnings_of(calls, family, {})
    assert told.startswith("the calibration data go to L of 12, beyond the 9 that the model declares for its engines")


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "name": ({"name": "a model"}, "the model's name is 'a model'; expected letters"),
    "axes": ({"axes": {}}, "x is not in both inputs and axes"),
    "unknown axis": ({"axes": {"x": ("B", "S", None)}}, "x has an axis 'S'; expected one of B, L"),
    "rank": ({"axes": {"x": ("B", "L")}}, r"x has 2 axes, and its example the shape \[2, 5, 16\]"),
    "range": ({"sizes": {"B": (1, 1, 4), "L": (9, 5, 1)}}, "L is .9, 5, 1.; expected minimum, default and maximum"),
    "type": ({"inputs": {"x": torch.zeros(2, 5, 16, dtype=torch.int8)}}, "x is torch.int8; expected one of bfloat16"),
    "no run": (
        {"inputs": {"y": torch.zeros(2, 5, 16)}, "axes": {"y": ("B", "L", None)}},
        "does not run on its example",
    ),
    "no linear": ({"linears": ["nothing.*"]}, r"has no linear that nothing\.\* matches"),
    "twice": ({"linears": ["twice"]}, "twice runs 2 times in a call; expected once"),
    "never": ({"linears": ["never"]}, "never does not run in a call; expected once"),
    "no blocks": ({"blocks": []}, r"blocks is \[\]; expected a list with one entry at least"),
    "a string": ({"linears": "once"}, "linears is 'once'; expected a list"),
    "a role": ({"roles": {"x": "banana"}}, "the role of 'x' is 'banana'; expected one of x, and one of normal, time"),
    "a role of nothing": ({"roles": {"z": "time"}}, "the role of 'z' is 'time'; expected one of x"),
    "no range": ({"sizes": {"B": (1, 1, 4), "L": 32}}, "L is 32; expected minimum, default and maximum"),
    "surplus": ({"sizes": {"B": (1, 1, 4), "L": (1, 5, 9), "Z": (1, 2, 3)}}, "no input has an axis Z"),
    "outputs": ({"outputs": {"y": ("B", "L", None), "z": ("B",)}}, "forward returns Tensor; expected 2 tensors"),
    "an output's rank": ({"outputs": {"y": ("B", "L")}}, r"the output y has the shape \[2, 5, 16\] of the examples"),
    "an output's size": ({"outputs": {"y": ("B", "L", 8)}}, r"its axes are \['B', 'L', 8\]"),
    "order": ({"make": lambda: _Two(backwards=True), "blocks": ["blocks", "more"]}, "in the order more, blocks"),
    "FP32": ({"inputs": {"x": torch.zeros(2, 5, 16)}}, "once reads torch.float32; give inputs"),
    "make": ({"make": lambda: 1 / 0}, r"make\(\) raised ZeroDivisionError: division by zero; it is called without"),
    "no module": ({"make": lambda: 3}, r"make\(\) returned a int; expected a torch.nn.Module"),
    "a buffer": ({"make": lambda: _Two(persistent=False)}, "the buffer table is not persistent, which no checkpoint"),
    "blocks": ({"blocks": ["layers"]}, "has no module layers, which blocks names"),
    "bare": ({"blocks": ["bare"], "linears": ["bare.*"]}, r"bare\.0 is a linear itself"),
    "no list": ({"blocks": ["once"]}, "once is a Linear; expected a ModuleList"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_description_that_does_not_fit_is_refused(what: str) -> None:
    changed, said = MISFITS[what]
    with pytest.raises(BadModule, match=said):
        _model(**changed).family()


def test_weights_of_another_module_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(BadModule, match=r"of the module to save is not that of what make\(\) makes"):
        save_checkpoint(_model(), nn.Linear(3, 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    broken = _Two()
    nn.init.constant_(broken.once.weight, torch.nan)
    with pytest.raises(BadModule, match=r"once\.weight of the module to save holds NaN"):
        save_checkpoint(_model(), broken, tmp_path / "out")
    save_checkpoint(_model(), _Two(), tmp_path / "out")
    with pytest.raises(OutputExists, match="out exists; give another folder, or force=True"):
        save_checkpoint(_model(), _Two(), tmp_path / "out")


class _Conditioned(nn.Module):
    """Blocks that read one text, and one vector, all of them."""

    def __init__(self) -> None:
        super().__init__()
        names = ("of_text", "of_time", "q")
        self.blocks = nn.ModuleList(_Block({name: nn.Linear(16, 16) for name in names}) for _ in range(2))

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, text, time)
        return x


class _Block(nn.ModuleDict):
    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self["q"](input=x) + self["of_text"](text).mean(1, keepdim=True) + self["of_time"](time)[:, None]


def test_linears_of_unlike_blocks_are_no_group_though_they_read_one_tensor() -> None:
    shapes = {"x": (2, 5, 16), "text": (2, 3, 16), "time": (2, 16)}
    family = _model(
        make=_Conditioned,
        inputs={name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()},
        axes={"x": ("B", "L", None), "text": ("B", "T", None), "time": ("B", None)},
        sizes={"B": (1, 1, 4), "L": (1, 5, 9), "T": (1, 3, 9)},
        linears=["*"],
    ).family()
    groups = family.groups({"blocks": 2})
    assert groups == tuple((f"blocks.{index}.{name}",) for index in range(2) for name in ("q", "of_text", "of_time"))
    assert [family.stream(path) for (path,) in groups[:3]] == ["L", "T", ""]


def test_linears_are_grouped_by_what_they_read() -> None:
    family = _model(blocks=["blocks"]).family()
    config = {"blocks": 1}
    assert family.groups(config) == (("once",), ("blocks.0.0",))
    assert [family.stream(path) for path in family.quantized(config)] == ["L", "L"]
    assert family.problem({"blocks": 2}) == "its blocks are {'blocks': 2}, expected {'blocks': 1}, as make() makes them"


def test_a_model_of_blocks_alone_runs_block_by_block() -> None:
    whole = _Conditioned()
    with torch.device("meta"):
        model = _Conditioned()
    stored = whole.state_dict()
    runner = BlockRunner(_returning_tuples(_model(), model), ["blocks.0", "blocks.1"], lambda name: stored[name])
    call = {"x": torch.randn(2, 5, 16), "text": torch.randn(2, 3, 16), "time": torch.randn(2, 16)}
    before: tuple[torch.Tensor, ...] = ()
    for block in ("blocks.0", "blocks.1"):
        with runner.loaded(block):
            before = runner.run(block, call, before)
    with torch.no_grad():
        assert torch.equal(before[0], whole(**call))
