"""What a quantized checkpoint's config says of its format is read, and named where it is none of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from calibration.checkpoints.quantized import read
from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json
from onnx_functions.inspection.inspect import describe


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"quant_algo": "W8A8_SQ_PER_CHANNEL"}, r"quantized to W8A8_SQ_PER_CHANNEL \(INT8 SmoothQuant\)"),
        ({"quant_algo": "mxfp4"}, r"quantized to mxfp4 \(MXFP4\)"),
        ({"quant_algo": "W4A8_NVFP4_FP8"}, r"\(NVFP4 weights with FP8 activations\)"),
        ({"quant_algo": "W4A16_NVFP4"}, r"\(weight-only NVFP4\)"),
        ({"quant_algo": "W4A16_AWQ"}, r"\(weight-only INT4 AWQ\)"),
        ({"quant_algo": "OF_TOMORROW"}, r"quantized to OF_TOMORROW, says"),
        ({"quant_method": "compressed-tensors"}, r"in the layout of compressed-tensors"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"proj_out": {"quant_algo": "W8A16"}}},
            r"proj_out in .* is quantized to W8A16 \(weight-only INT8\)",
        ),
        ([], r"quantization_config is \[\], expected ModelOpt's"),
        ({"quantized_layers": {"proj_out": "NVFP4"}}, r"expected ModelOpt's: copy config\.json again"),
    ],
)
def test_a_format_that_is_not_read_is_named_by_every_reader(
    described: object, named: str, copy_of_digits: Path
) -> None:
    path = copy_of_digits / "config.json"
    config = load_json(path)
    known = config["quantization_config"]
    config["quantization_config"] = {**known, **described} if isinstance(described, dict) else described
    path.write_text(json.dumps(config), encoding="utf-8")
    for verb in (read, describe):
        with pytest.raises(BadCheckpoint, match=named):
            verb(copy_of_digits)


def test_attention_of_an_unnamed_format_is_refused(fp8_attention: Callable[..., Path], tmp_path: Path) -> None:
    folder = fp8_attention(tmp_path / "attention", ["transformer_blocks.0.attn"])
    weights = folder / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    for name in "qkv":
        tensors[f"transformer_blocks.0.attn.{name}_bmm_quantizer._amax"] = tensors.pop(
            f"transformer_blocks.0.attn.{name}_scale"
        )
    save_file(tensors, weights)
    with pytest.raises(BadCheckpoint, match=r"q_bmm_quantizer\._amax.*kv_cache_scheme None; expected FP8 attention"):
        read(folder)
