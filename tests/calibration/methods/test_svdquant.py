"""SVDQuant is ModelOpt's, its group shares what one GEMM needs, and the checkpoint holds it bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import fp4trt
from calibration.by_block.quantize_blocks import BlockResult, BlockTask
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import load, read
from calibration.digits.model import load_transformer
from calibration.formats import fp8, mxfp8, nvfp4
from calibration.formats.linears import QuantizedLinear
from calibration.methods.modelopt.svdquant import svdquant
from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import tensors_in_file, write
from generation.comparison.digits import compare

BLOCK = "single_transformer_blocks.0"
MODULATION = (f"{BLOCK}.norm.linear",)
MERGED = tuple(f"{BLOCK}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
ALONE = (f"{BLOCK}.proj_out",)


def _inputs(count: int) -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 16, 128), "encoder_hidden_states": (2, 8, 128), "temb": (2, 128)}
    return [
        {name: torch.randn(shape, generator=random).bfloat16() for name, shape in shapes.items()} for _ in range(count)
    ]


def _rows(path: str) -> int:
    return 1 if "norm" in path else 16


def _quantized(smoothing: bool) -> tuple[BlockTask, BlockResult, nn.Module]:
    """Quantize a block of the built-in model; return it as ModelOpt has it, the result, and the block as it was."""
    block = load_transformer().get_submodule(BLOCK).to(torch.bfloat16)
    plain, calls = copy.deepcopy(block), _inputs(3)

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                block(**call)

    groups = (MERGED, ALONE)
    task = BlockTask(BLOCK, block, {path: "nvfp4" for group in groups for path in group}, groups, run)
    return task, svdquant(rank=8, smoothing=smoothing, alpha_step=0.5, rows=_rows)(task), plain


@pytest.fixture(scope="module", params=[True, False], ids=["smoothed", "not smoothed"])
def quantized(request: pytest.FixtureRequest) -> tuple[BlockTask, BlockResult, nn.Module]:
    return _quantized(request.param)


def _loaded(plain: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return a block whose linears are what a checkpoint of these tensors gives."""
    block = copy.deepcopy(plain)
    for path in (*MERGED, *ALONE):
        held = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{path}.")}
        linear: Any = block.get_submodule(path.removeprefix(f"{BLOCK}."))
        state = {"bias": linear.bias, **{kind: value for kind, value in held.items() if "weight" not in kind}}
        codes = nvfp4.unpack_codes(held["weight"])
        state["weight"] = nvfp4.dequantize(codes, held["weight_scale"], held["weight_scale_2"]).bfloat16()
        smoothed, rank = "pre_quant_scale" in held, len(held["svdquant_lora_a"])
        new = QuantizedLinear(linear.in_features, linear.out_features, True, "nvfp4", rank=rank, smoothing=smoothed)
        new.load_state_dict(state, assign=True)
        block.set_submodule(path.removeprefix(f"{BLOCK}."), new)
    return block


def test_the_loaded_block_equals_modelopts_fake_quantized_one_bit_for_bit(
    quantized: tuple[BlockTask, BlockResult, nn.Module],
) -> None:
    task, result, plain = quantized
    call = _inputs(4)[-1]
    with torch.no_grad():
        expected, found = task.module(**call), _loaded(plain, result.tensors)(**call)
        original = plain(**call)
    for one, other, before in zip(found, expected, original, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, before)


def test_scales_and_factors_are_the_quantizers_own(quantized: tuple[BlockTask, BlockResult, nn.Module]) -> None:
    task, result, _ = quantized
    whole: Any = task.module.get_submodule("attn.to_q.whole.linear")
    row = 0
    for path in MERGED:
        codes = nvfp4.unpack_codes(result.tensors[f"{path}.weight"])
        rows = slice(row, row + len(codes))
        row += len(codes)
        scale = result.tensors[f"{path}.weight_scale_2"]
        assert scale == nvfp4.global_scale(whole.weight_quantizer.amax.float())
        assert result.tensors[f"{path}.input_scale"] == nvfp4.global_scale(whole.input_quantizer.amax.float())
        weight = nvfp4.dequantize(codes, result.tensors[f"{path}.weight_scale"], scale).bfloat16()
        assert torch.equal(weight, whole.weight_quantizer(whole.weight)[rows])
        assert torch.equal(result.tensors[f"{path}.svdquant_lora_a"], whole.weight_quantizer.svdquant_lora_a)
        assert torch.equal(result.tensors[f"{path}.svdquant_lora_b"], whole.weight_quantizer.svdquant_lora_b[rows])
    assert row == len(whole.weight)


def test_smoothing_is_shared_in_a_group_and_left_out_where_it_is_not_wanted(
    quantized: tuple[BlockTask, BlockResult, nn.Module],
) -> None:
    task, result, _ = quantized
    whole: Any = task.module.get_submodule("attn.to_q.whole.linear")
    kept = {path: result.tensors.get(f"{path}.pre_quant_scale") for path in (*MERGED, *ALONE)}
    if whole.input_quantizer.pre_quant_scale is None:
        assert set(kept.values()) == {None}
        return
    assert all(torch.equal(kept[path], kept[MERGED[0]]) for path in MERGED)  # type: ignore[arg-type]
    assert not torch.equal(kept[ALONE[0]][:128], kept[MERGED[0]])  # type: ignore[index, arg-type]
    assert kept[MERGED[0]].unique().numel() > 50  # type: ignore[union-attr]


def test_the_branch_and_the_residual_are_the_smoothed_weight(
    quantized: tuple[BlockTask, BlockResult, nn.Module],
) -> None:
    task, result, plain = quantized
    original: Any = plain.get_submodule("proj_out")
    residual: Any = task.module.get_submodule("proj_out")
    a, b = (result.tensors[f"{BLOCK}.proj_out.svdquant_lora_{kind}"].float() for kind in "ab")
    smoothing = result.tensors.get(f"{BLOCK}.proj_out.pre_quant_scale", torch.ones(a.shape[1])).float()
    whole = (residual.weight.float() + b @ a) * smoothing
    assert (whole - original.weight.float()).norm() < 5e-3 * original.weight.float().norm()
    figures = result.figures["svdquant"][f"{BLOCK}.proj_out"]
    assert figures["residual"] < 0.9  # of the norm, though the rank is 8 of 128
    assert figures["weight_error"] < 0.1 * figures["residual"]


def test_it_is_what_modelopts_own_export_would_store() -> None:
    from modelopt.torch.export import unified_export_hf

    task, result, _ = _quantized(smoothing=True)
    linear: Any = task.module.get_submodule("proj_out")
    holder = nn.ModuleDict({"proj_out": linear})
    unified_export_hf._process_quantized_modules(holder, torch.bfloat16)
    unified_export_hf._promote_quantizer_tensors_to_module(holder)
    theirs = {
        name.removeprefix("proj_out."): value
        for name, value in holder.state_dict().items()
        if "quantizer" not in name and not name.endswith("bias")
    }
    ours = {name.rpartition(".")[2]: value for name, value in result.tensors.items() if name.startswith(ALONE[0])}
    assert ours.keys() == theirs.keys()
    for kind, value in theirs.items():
        assert ours[kind].dtype == value.dtype, kind
        assert torch.equal(ours[kind].float(), value.float()), kind


def _rounded_in(kind: str) -> tuple[nn.Module, list[dict[str, Any]], dict[str, dict[str, torch.Tensor]]]:
    """Return a block as it was, its calls, and what SVDQuant makes of all linears but the last in a format, by path."""
    block = load_transformer().get_submodule(BLOCK).to(torch.bfloat16)
    plain, calls, formats = copy.deepcopy(block), _inputs(2), dict.fromkeys((*MODULATION, *MERGED), kind)

    def run() -> None:
        with torch.no_grad():
            for call in calls:
                block(**call)

    task = BlockTask(BLOCK, block, {**formats, ALONE[0]: "nvfp4"}, (MODULATION, MERGED, ALONE), run)
    tensors = svdquant(rank=4, smoothing=True, alpha_step=0.5, rows=_rows)(task).tensors
    assert f"{ALONE[0]}.svdquant_lora_a" in tensors
    names = {path: [name for name in tensors if name.startswith(f"{path}.")] for path in formats}
    return (
        plain,
        calls,
        {path: {n.removeprefix(f"{path}."): tensors[n] for n in found} for path, found in names.items()},
    )


def test_linears_in_fp8_are_measured_and_left_without_a_branch_under_one_weight_scale_a_group() -> None:
    plain, calls, kept = _rounded_in("fp8")
    entering = max(nn.functional.silu(call["temb"]).abs().amax() for call in calls)
    assert kept[MODULATION[0]]["input_scale"] == entering.float() / 448
    for group in (MODULATION, MERGED):
        weights: dict[str, Any] = {path: plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight for path in group}
        largest = torch.stack([weight.abs().amax().float() for weight in weights.values()])
        assert len(largest.unique()) == len(group)
        for path, weight in weights.items():
            assert kept[path].keys() == {"weight", "weight_scale", "input_scale"}
            assert kept[path]["weight_scale"] == largest.max() / 448
            assert torch.equal(kept[path]["weight"].float(), fp8.quantize(weight, largest.max() / 448).float())


def test_linears_in_mxfp8_are_rounded_to_nearest_and_left_without_a_branch() -> None:
    plain, _, kept = _rounded_in("mxfp8")
    for path, found in kept.items():
        weight: Any = plain.get_submodule(path.removeprefix(f"{BLOCK}.")).weight
        codes, scales = mxfp8.quantize(weight)
        assert found.keys() == {"weight", "weight_scale"}
        assert torch.equal(found["weight"].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(found["weight_scale"], scales)


def test_a_checkpoint_tells_its_branches(svdquant_checkpoint: Path) -> None:
    checkpoint = read(svdquant_checkpoint)
    assert len(checkpoint.quantized) == 20
    ranks = {path: 8 * len(group) for group in checkpoint.groups for path in group}
    assert {path: checkpoint.rank(path) for path in checkpoint.quantized} == ranks
    modulations = {path for path in checkpoint.quantized if ".norm" in path}
    assert {path for path in checkpoint.quantized if not checkpoint.is_smoothed(path)} == modulations
    manifest = load_json(svdquant_checkpoint / "fp4trt.json")
    assert manifest["quantized"]["svdquant"] == manifest["quantized"]["nvfp4"] == list(checkpoint.quantized)
    assert manifest["recipe"]["method"] == {"name": "svdquant", "rank": 8, "smoothing": True, "alpha_step": 0.1}
    assert set(manifest["blocks"]) == set(checkpoint.family.blocks(checkpoint.config))
    config = checkpoint.config["quantization_config"]
    assert config["quant_algo"] == "NVFP4_SVD"
    assert "lora_rank" not in config["config_groups"]["group_0"]  # which would be one for all


def test_it_follows_the_model_more_closely_than_plain_rounding(
    digits: Path, svdquant_checkpoint: Path, quantized_digits: Path
) -> None:
    folders = {"svdquant": svdquant_checkpoint, "ptq": quantized_digits}
    models = {name: load(folder, dtype=torch.float32) for name, folder in folders.items()}
    found = compare(load_source(digits, torch.float32), models, (1000,), 20)
    assert found.difference("svdquant", "ptq", "psnr_db").low > 3
    assert found.estimate("svdquant", "velocity_error").mean < 0.75 * found.estimate("ptq", "velocity_error").mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("svdquant_lora_b"), "half of the branch"),
        (lambda tensors: tensors.update(svdquant_lora_b=tensors["svdquant_lora_b"][:, :-1]), r"expected \[128, 32\]"),
        (lambda tensors: tensors.update(pre_quant_scale=tensors["pre_quant_scale"][:-1]), r"expected \[128\]"),
        (lambda tensors: [tensors.pop(f"svdquant_lora_{kind}") for kind in "ab"], "says that the linear is NVFP4_SVD"),
    ],
)
def test_a_damaged_branch_is_refused(change: Any, message: str, svdquant_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "fp4trt.json"):
        (tmp_path / name).write_bytes((svdquant_checkpoint / name).read_bytes())
    weights = svdquant_checkpoint / "diffusion_pytorch_model.safetensors"
    tensors = {name: stored.tensor() for name, stored in tensors_in_file(weights).items()}
    path = f"{BLOCK}.attn.to_k"
    own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{path}.")}
    changed = {name.removeprefix(f"{path}."): value for name, value in own.items()}
    change(changed)
    _save(tmp_path / weights.name, tensors | {f"{path}.{kind}": value for kind, value in changed.items()})
    with pytest.raises(BadCheckpoint, match=message):
        read(tmp_path)


def _save(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from fp4trt.safetensors_file import bytes_of, plan_of

    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    plan = [plan_of(name, value) for name, value in ordered.items()]
    write(file, plan, ((name, bytes_of(value)) for name, value in ordered.items() if value.numel()), {"format": "pt"})


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "svdquant", "rank": 129}, ("method.rank is 129, and", "expected at most 128")),
        ({"name": "quality", "rank": 129}, ("method.rank is 129, and", "expected at most 128")),
        (
            {"name": "quality", "rank": 65, "rank_multiple": 64},  # 195 of three linears become 256
            ("method.rank is 65, rounded up to a multiple of 64, and", "expected at most 42"),
        ),
        ({"name": "quality", "rank": 8, "rank_multiple": 1000}, ("expected a rank_multiple of at most 128",)),
    ],
)
def test_a_rank_above_a_layers_size_ends_with_status_2_in_one_line(
    method: dict[str, Any], words: tuple[str, ...], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"name": "mine", "method": method}), encoding="utf-8")
    assert fp4trt.run(["quantize", str(digits), "-o", str(tmp_path / "out"), "--recipe", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(each in error for each in words)
    assert not (tmp_path / "out").exists()
