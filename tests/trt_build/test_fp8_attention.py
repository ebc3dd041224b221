"""Attention in FP8 as TensorRT builds it: one kernel each, or an error that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import fp4trt
from calibration import quantize
from exporter import export
from fp4trt.errors import BadProfileError, CoverageError, LintError
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from trt_build import build
from trt_build.graph import read_graph

pytestmark = pytest.mark.slow

pytest.importorskip("tensorrt_rtx")

DOUBLE_BLOCKS, SINGLE_BLOCKS = 1, 1


def test_every_attention_of_the_built_in_model_is_one_kernel_and_fp4_stays(
    fp8_attention_digits: Path, tmp_path: Path
) -> None:
    told: list[str] = []
    result = build(fp8_attention_digits, output=tmp_path / "digits.engine", on_line=told.append)
    assert result["fp8_attentions"] == result["quantized_attentions"] == DOUBLE_BLOCKS + SINGLE_BLOCKS
    assert result["lost_attentions"] == []
    assert result["fp4_linears"] == result["quantized_linears"] == 14 * DOUBLE_BLOCKS + 6 * SINGLE_BLOCKS
    assert result["fp4_gemms"] <= 10 * DOUBLE_BLOCKS + 3 * SINGLE_BLOCKS
    # Nobody gave a size: the least picture of the model, 8 pixels with one word, would be 5 tokens.
    assert (result["profile"]["L"], result["profile"]["T"]) == ([36, 36, 64], [1, 8, 32])
    assert "attention in FP8 needs 32 tokens or more: the profile begins at --resolution 24" in told


def test_the_profile_may_begin_at_32_tokens_and_not_at_31(fp8_attention_digits: Path, tmp_path: Path) -> None:
    result = build(fp8_attention_digits, resolution="16:16:32", text="16", output=tmp_path / "digits.engine")
    assert result["fp8_attentions"] == 2
    with pytest.raises(
        BadProfileError, match=r"begins at 31 \(L 16, T 15\); give at least --resolution 20 or --text 16"
    ):
        build(fp8_attention_digits, resolution="16:16:32", text="15:16:16")


def test_a_profile_that_begins_below_32_tokens_ends_with_status_2(
    fp8_attention_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = tmp_path / "digits.engine"
    command = ["build", str(fp8_attention_digits), "-o", str(engine), "--resolution", "16", "--text", "8"]
    assert fp4trt.run(command) == 2
    assert "attention in FP8 needs 32 tokens of picture and text together" in capsys.readouterr().err
    assert not engine.exists()


def test_a_graph_says_how_many_keys_each_attention_reads(fp8_attention_digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fp8_attention_digits, tmp_path / "digits")
    assert read_graph(folder).keys == (("L", "T"),)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    (scores,) = (v for v in model.graph.value_info if v.name.startswith("transformer_blocks.0.attn/scores/MatMul"))
    scores.type.tensor_type.shape.dim[-1].dim_param = "T"
    onnx.save(model, folder / "model.onnx")
    assert read_graph(folder).keys == (("T",), ("L", "T"))
    with pytest.raises(BadProfileError, match=r"needs 32 tokens of text, .* at 8 \(T 8\); give at least --text 32"):
        build(folder, resolution=24, text="8:16:16")
    model.graph.value_info.remove(scores)
    onnx.save(model, folder / "model.onnx")
    assert read_graph(folder).keys == ()


def _without_metadata(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("fp4trt.json"))
    model = onnx.load(target / "model.onnx", load_external_data=False)
    del model.metadata_props[:]
    onnx.save(model, target / "model.onnx")
    return target


def test_attention_that_fell_apart_is_an_error_where_no_metadata_tell_of_tokens(
    fp8_attention_digits: Path, tmp_path: Path
) -> None:
    foreign = _without_metadata(fp8_attention_digits, tmp_path / "foreign")
    shapes = ["B=1", "L=16", "T=8"]
    with pytest.raises(CoverageError, match=r"2 of 2 attentions.*transformer_blocks\.0\.attn.*fewer than 32 tokens"):
        build(foreign, shapes=shapes)
    assert not list(foreign.glob("*.engine*"))
    result = build(foreign, shapes=shapes, allow_slow=True)
    assert (result["fp8_attentions"], result["quantized_attentions"]) == (0, 2)
    assert len(result["lost_attentions"]) == 2
    with pytest.raises(CoverageError, match="2 of 2 attentions"):  # the cached engine does not hide it
        build(foreign, shapes=shapes)
    assert build(foreign, shapes=["B=1", "L=16", "T=16"])["fp8_attentions"] == 2


def _bypass(model: onnx.ModelProto, operand: str) -> None:
    nodes = {node.name: node for node in model.graph.node}
    path = "single_transformer_blocks.0.attn"
    quantize, dequantize = (nodes[f"{path}/{operand}/{kind}Linear"] for kind in ("Quantize", "Dequantize"))
    for node in model.graph.node:
        node.input[:] = [quantize.input[0] if name == dequantize.output[0] else name for name in node.input]
    model.graph.node.remove(quantize)
    model.graph.node.remove(dequantize)


@pytest.mark.parametrize("operand", ["q", "k", "v"])
def test_a_missing_quantizer_loses_the_kernel_and_is_named(
    operand: str, fp8_attention_digits: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fp8_attention_digits, tmp_path / "damaged")
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    _bypass(model, operand)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(LintError, match=rf"single_transformer_blocks\.0\.attn.*{operand}"):
        build(folder)
    if operand != "v":  # lint tells them apart; one build shows what TensorRT makes of it
        return
    (lost,) = build(folder, allow_slow=True)["lost_attentions"]
    assert lost["attention"] == "single_transformer_blocks.0.attn"
    assert lost["reason"] == f"its {operand} is not in FP8"


def test_at_the_sizes_of_flux_every_attention_is_one_kernel(
    tiny_flux: Callable[..., Path], fp8_attention_recipe: Path, tmp_path: Path
) -> None:
    """1024 x 1024 pixels: 4096 tokens and 512 of text; heads of 128, two of FLUX.1's 24; one block of each kind."""
    source = tiny_flux(tmp_path / "flux", attention_head_dim=128, axes_dims_rope=(16, 56, 56))
    config: dict[str, Any] = load_json(source / "config.json")
    family = family_of(config)
    amax = dict.fromkeys(family.quantized(config), 4.0)
    amax |= {f"{path}.{operand}": 8.0 for path in family.attentions(config) for operand in "qkv"}
    maxima = tmp_path / "amax.json"
    maxima.write_text(json.dumps(amax))
    quantize(source, tmp_path / "flux-fp8", recipe=fp8_attention_recipe, calibration=maxima)
    export(tmp_path / "flux-fp8")
    result = build(tmp_path / "flux-fp8", resolution=1024, text=512, batch=1)
    assert result["profile"] == {"B": [1, 1, 1], "L": [4096, 4096, 4096], "T": [512, 512, 512]}
    assert (result["fp8_attentions"], result["quantized_attentions"]) == (2, 2)
    assert result["fp4_linears"] == result["quantized_linears"] == 20
