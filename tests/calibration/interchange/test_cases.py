"""Every case of the table: what a reader makes of a converted checkpoint, or in which words it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fp4trt
from fp4trt.json_file import load_json
from fp4trt.progress import reporting
from tests.calibration.interchange import cases, readers
from tests.calibration.interchange.cases import CASES, EXACT, REFUSED, Case
from tests.calibration.interchange.conftest import Make

WHOLE = "diffusion_pytorch_model.safetensors"
FOLDERS = ("diffusers", "modelopt")


@dataclass(frozen=True)
class Done:
    """A conversion that has been made: its case, what it is of, its result, a folder for more, and what was said."""

    case: Case
    source: Path
    result: Path
    folder: Path
    notes: list[str]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_conversion_is_what_the_table_says(
    case: Case, checkpoint: Make, digits: Path, input_amax: Mapping[str, float], tmp_path: Path
) -> None:
    source = checkpoint(case)
    amax = tmp_path / "amax.json"
    amax.write_text(json.dumps(input_amax), encoding="utf-8")
    options: dict[str, Any] = {"like": digits} if source.is_file() else {}
    options |= {"from_layout": case.said} if case.said else {}
    options |= {"calibration": amax} if case.calibrated else {}
    done = Done(case, source, tmp_path / f"result{'' if case.to in FOLDERS else '.safetensors'}", tmp_path, [])
    with reporting(note=done.notes.append):
        if case.result == REFUSED:
            with pytest.raises(ValueError, match=r".") as refused:
                fp4trt.convert(source, done.result, to=case.to, **options)
            assert case.words in str(refused.value)
            assert "\n" not in str(refused.value)
            assert refused.value.exit_code == 2
            assert list(tmp_path.iterdir()) == [amax]
            return
        fp4trt.convert(source, done.result, to=case.to, **options)
    difference = _READERS[case.reader](done)
    assert difference == 0.0 if case.result == EXACT or case.to == "modelopt" else 1e-5 < difference < 1e-2
    in_16_bit = [line for line in done.notes if "leaves their inputs in 16 bit" in line]
    assert len(in_16_bit) == (case.result != EXACT and case.to == "modelopt")


def test_the_document_shows_these_cases() -> None:
    guide = cases.GUIDE.read_text(encoding="utf-8")
    assert cases.written_into(guide) == guide


def _by_comfy_kitchen(done: Done) -> float:
    return readers.by_comfy_kitchen(done.result, done.source)


def _in_bf16(done: Done) -> float:
    return readers.by_comfy_kitchen(done.result, done.source, torch.bfloat16)


def _back(done: Done) -> float:
    fp4trt.convert(done.result, done.folder / "back", to="modelopt")
    return readers.same_files(done.folder / "back", done.source)


def _weights_back(done: Done) -> float:
    fp4trt.convert(done.result, done.folder / "back", to="modelopt")
    return readers.same_weights(done.folder / "back", done.source)


def _by_diffusers(done: Done) -> float:
    if done.result.is_dir():
        return readers.by_diffusers(done.result / WHOLE, done.source, done.result)
    config = load_json(done.source / "config.json")
    del config["quantization_config"]
    (done.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return readers.by_diffusers(done.result, done.source, done.folder)


def _by_torchao(done: Done) -> float:
    return readers.by_torchao(done.result, done.source)


def _by_fp4trt(done: Done) -> float:
    return readers.of_other_programs(done.result, done.source, done.case.said == "bfl")


_READERS: dict[str, Callable[[Done], float]] = {
    cases.COMFYUI: _by_comfy_kitchen,
    f"{cases.COMFYUI} in BF16": _in_bf16,
    f"{cases.COMFYUI}, branch as a bypass": _by_comfy_kitchen,
    cases.BACK: _back,
    cases.DIFFUSERS: _by_diffusers,
    cases.TORCHAO: _by_torchao,
    cases.FP4TRT: _by_fp4trt,
    f"{cases.FP4TRT}, --calibration": _by_fp4trt,
    f"{cases.FP4TRT}, --from comfyui": _by_fp4trt,
    f"{cases.FP4TRT}, weights alone": _weights_back,
    cases.FROM_BFL: _by_fp4trt,
}
