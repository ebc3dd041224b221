"""SimpleTuner's class of FLUX.1, trained with a mask of the text, is taken as diffusers' without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest

import fp4trt
from calibration.checkpoints.quantized import WEIGHTS, load
from calibration.inputs.prompts import load_pipeline
from fp4trt.errors import BadInputs
from fp4trt.json_file import load_json

MASKED = "FluxTransformer2DModelWithMasking"
REMARK = f"a {MASKED} is taken as FluxTransformer2DModel: the mask that its attention may have is not applied\n"


def test_every_verb_takes_it_and_says_once_that_its_mask_is_not_applied(
    tiny_flux: Callable[..., Path], shared_traces: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = tiny_flux(tmp_path / "plain")
    masked = tiny_flux(tmp_path / "masked")
    config = load_json(masked / "config.json") | {"_class_name": MASKED}
    (masked / "config.json").write_text(json.dumps(config))
    for source in (plain, masked):
        capfd.readouterr()
        assert fp4trt.run(["quantize", str(source), "-o", f"{source}-mxfp8", "--recipe", "mxfp8-ptq"]) == 0
    result = tmp_path / "masked-mxfp8"
    assert capfd.readouterr().err.count(REMARK) == 1
    assert load_json(result / "config.json")["_class_name"] == MASKED
    assert (result / WEIGHTS).read_bytes() == (tmp_path / "plain-mxfp8" / WEIGHTS).read_bytes()
    assert type(load(result)) is diffusers.FluxTransformer2DModel
    for command in (["inspect", str(masked)], ["export", str(result)]):
        capfd.readouterr()
        assert fp4trt.run(command) == 0
        assert capfd.readouterr().err.count(REMARK) == 1


def test_a_pipeline_that_names_it_as_diffusers_class_is_refused_in_one_line(
    tiny_flux: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", MASKED]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(tiny_flux(tmp_path / "transformer"))
    with pytest.raises(BadInputs, match=rf"names {MASKED}, which diffusers has not, .* write FluxTransformer2DModel$"):
        load_pipeline(tmp_path, transformer)
