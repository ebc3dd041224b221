"""Checkpoints for servers, against each one's own rule of which layers are quantized, written here from its code."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import fp4trt
from fp4trt.errors import BadOption, BadRecipe
from fp4trt.json_file import load_json


def _sglang(name: str, ignore: list[str]) -> bool:
    """Whether SGLang takes a linear as quantized: ``ignore`` are names with stars, held against the whole name."""
    plain = name.endswith((".norm1.linear", ".norm1_context.linear", ".norm.linear"))  # plain nn.Linear in its FLUX.1
    patterns = (re.escape(pattern).replace(r"\*", ".*") for pattern in ignore)
    return not plain and not any(re.fullmatch(pattern, name) for pattern in patterns)


def _vllm(name: str, ignore: list[str]) -> bool:
    """Whether vLLM-Omni does: parts of names, then shell patterns; double blocks and norms get no quantization."""
    plain = name.startswith("transformer_blocks.") or name.endswith(".norm.linear")
    embedders = ("x_embedder", "context_embedder", "proj_out", "norm_out.linear")  # nn.Linear there
    plain = plain or name in embedders or name.startswith("time_text_embed.")
    excluded = any(part in name or fnmatch.fnmatch(name, part) for part in ignore)
    return not plain and not excluded


def _tensorrt_llm(name: str, ignore: list[str]) -> bool:
    """Whether TensorRT-LLM does: shell patterns, held against the name and the modules around it."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return not any(fnmatch.fnmatchcase(path, pattern) for path in around for pattern in ignore)


RULES: dict[str, Callable[[str, list[str]], bool]] = {
    "sglang": _sglang,
    "vllm-omni": _vllm,
    "tensorrt-llm": _tensorrt_llm,
}


def _linears(folder: Path) -> tuple[set[str], set[str]]:
    """Return the linears of a checkpoint that are packed, and those that are not, by what its file holds."""
    packed, plain = set(), set()
    with safe_open(folder / "diffusion_pytorch_model.safetensors", "pt") as file:
        names = set(file.keys())
        for name in names:
            if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2:
                path = name.removesuffix(".weight")
                (packed if f"{path}.weight_scale" in names else plain).add(path)
    return packed, plain


@pytest.mark.parametrize("server", RULES)
def test_a_server_sees_as_quantized_what_is(server: str, digits: Path, five_calls: Path, tmp_path: Path) -> None:
    fp4trt.quantize(digits, tmp_path / "out", recipe="nvfp4-ptq", calibration=five_calls, server=server)
    config = load_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert config["quant_algo"] == "NVFP4"
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    packed, plain = _linears(tmp_path / "out")
    assert packed
    assert plain
    wrong = {path for path in packed | plain if RULES[server](path, config["ignore"]) != (path in packed)}
    assert wrong == set()


def test_the_usual_checkpoint_is_read_alike_by_all_readers_of_its_list(quantized_digits: Path) -> None:
    ignore = load_json(quantized_digits / "config.json")["quantization_config"]["ignore"]
    packed, plain = _linears(quantized_digits)
    for path in packed | plain:
        stars = any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), path) for pattern in ignore)
        shell = any(fnmatch.fnmatch(path, pattern) for pattern in ignore)
        parts = shell or any(pattern in path for pattern in ignore)
        assert stars == shell == parts == (path in plain), path


def test_rules_of_the_recipe_and_of_the_server_are_one(digits: Path, five_calls: Path, tmp_path: Path) -> None:
    """A rule that keeps some blocks in BF16 fits; one that puts a modulation in FP8 does not."""
    for kind in ("bf16", "fp8"):
        recipe = tmp_path / f"{kind}.yaml"
        rules = f"formats: {{rules: [{{linears: 'transformer_blocks.0.norm1.linear', format: {kind}}}]}}"
        recipe.write_text(f"name: mine\nmethod: {{name: ptq}}\n{rules}\n")
    given: dict[str, Any] = {"calibration": five_calls, "server": "sglang"}
    fp4trt.quantize(digits, tmp_path / "out", recipe=tmp_path / "bf16.yaml", **given)
    packed, _ = _linears(tmp_path / "out")
    assert not any(".norm" in path for path in packed)
    with pytest.raises(BadRecipe, match=r"puts transformer_blocks.0.norm1.linear in fp8, and SGLang takes it in BF16"):
        fp4trt.quantize(digits, tmp_path / "other", recipe=tmp_path / "fp8.yaml", **given)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "branches": ({"recipe": "nvfp4-quality-r8", "server": "sglang"}, "quant_algo NVFP4_SVD, and SGLang loads NVFP4;"),
    "their rank": (
        {"recipe": "nvfp4-quality-r8", "server": "tensorrt-llm"},
        "branches of rank 8, and TensorRT-LLM loads multiples of 32; take nvfp4-quality-r32 or svdquant-r32",
    ),
    "smoothing": ({"recipe": "nvfp4-modelopt-awq", "server": "vllm-omni"}, "quant_algo NVFP4_AWQ, and vLLM-Omni loads"),
    "MXFP8": (
        {"recipe": "mxfp8-ptq", "server": "tensorrt-llm"},
        "quant_algo MXFP8, and TensorRT-LLM loads NVFP4 or FP8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_server_cannot_load_is_refused(case: str, digits: Path, five_calls: Path, tmp_path: Path) -> None:
    options, message = REFUSED[case]
    with pytest.raises(BadRecipe, match=re.escape(message)):
        fp4trt.quantize(digits, tmp_path / "out", calibration=five_calls, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_not_known_is_refused(tiny_flux: Callable[..., Path], digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "fp8.yaml"
    recipe.write_text("name: mine\nmethod: {name: ptq}\nattention: fp8\n")
    with pytest.raises(BadRecipe, match="has attention: fp8, which SGLang does not load"):
        fp4trt.quantize(digits, tmp_path / "out", recipe=recipe, server="sglang")
    with pytest.raises(BadOption, match="server is 'triton'"):
        fp4trt.quantize(digits, tmp_path / "out", server="triton")
