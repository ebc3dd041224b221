"""Attention in FP8: what torch computes, what calibration measures for it, and what a checkpoint holds of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fp4trt
from calibration.by_block.calibration import merged
from calibration.by_block.measure_amax import measured_by_block
from calibration.by_block.quantize_blocks import BlockResult, BlockTask, prepared_by_block
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import WEIGHTS, load, read
from calibration.formats import fp8
from calibration.formats.attention_amax import OperandAmax, checked_attentions
from calibration.formats.fp8_attention import SCALES, FP8Attention, attention_scales
from calibration.inputs.captured import load_inputs
from calibration.quantization import quantize
from fp4trt.errors import BadAmax, BadCheckpoint, BadRecipe
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from tests.frame.diffusers_models import MODELS

FIRST, LAST = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"

MakeAttention = Callable[..., Path]


def test_it_computes_the_slow_references_products() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=random).bfloat16() * size for size in (4, 3, 1))
    scales = [fp8.tensor_scale(x.float().abs().max()) for x in (q, k, v)]
    scales[1] = scales[1] / 2  # some of k saturates
    found = FP8Attention()(q, k, v, scales)

    def rounded(x: np.ndarray, scale: float | np.float32) -> np.ndarray:
        codes = fp8.quantize_reference(x, scale).view(ml_dtypes.float8_e4m3fn)
        return _bfloat16(codes.astype(np.float32) * np.float32(scale))

    a, b, c = (rounded(x.float().numpy(), scale.numpy()) for x, scale in zip((q, k, v), scales, strict=True))
    scores = _bfloat16(a @ b.swapaxes(-1, -2)) * np.float32(8**-0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = rounded(weights / weights.sum(-1, keepdims=True), np.float32(1 / 448)) @ c
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.float().numpy(), expected, rtol=2**-8, atol=2**-10)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_only_the_attentions_with_scales_compute_in_fp8(
    quantized_digits: Path, fp8_attention: MakeAttention, tmp_path: Path
) -> None:
    checkpoint = read(fp8_attention(tmp_path / "mixed", [LAST]))
    assert checkpoint.fp8_attentions == (LAST,)
    model = load(checkpoint.directory)
    assert [path for path, module in model.named_modules() if isinstance(module, FP8Attention)] == [
        f"{LAST}.fp8_attention"
    ]
    call = checkpoint.family.example_inputs(checkpoint.config, (1, 16, 16), 0, torch.bfloat16)
    with torch.no_grad():
        before = load(quantized_digits)(**call, return_dict=False)[0].float()
        after, again = (net(**call, return_dict=False)[0].float() for net in (model, copy.deepcopy(model)))
        plain = load(checkpoint.directory, quantize_activations=False)(**call, return_dict=False)[0]
        expected = load(quantized_digits, quantize_activations=False)(**call, return_dict=False)[0]
    assert torch.equal(after, again)
    assert 1e-3 < float((after - before).norm() / before.norm()) < 0.1
    assert torch.equal(plain, expected)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda tensors: tensors.pop(f"{FIRST}.k_scale"), r"has nothing as .*0\.attn\.k_scale"),
        (lambda tensors: tensors.update({f"{FIRST}.v_scale": torch.ones(2)}), r"0\.attn\.v_scale is F32\[2\]"),
        (lambda tensors: [tensors.pop(f"{FIRST}.{name}") for name in SCALES], r"has nothing as .*0\.attn\.q_scale"),
    ],
)
def test_a_checkpoint_without_all_scales_of_an_attention_is_refused(
    damage: Callable[[dict[str, torch.Tensor]], object], found: str, fp8_attention: MakeAttention, tmp_path: Path
) -> None:
    folder = fp8_attention(tmp_path / "damaged", [FIRST])
    tensors = load_file(folder / WEIGHTS)
    damage(tensors)
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(BadCheckpoint, match=found):
        read(folder)


def test_maxima_of_before_stay_valid_and_lack_only_what_attention_in_fp8_needs(
    quantized_digits: Path, tmp_path: Path
) -> None:
    checkpoint = read(quantized_digits)
    linears, attentions = checkpoint.quantized, checkpoint.family.attentions(checkpoint.config)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(dict.fromkeys(linears, 2.0)))
    amax = merged([old], linears, attentions).amax
    assert amax == dict.fromkeys(linears, 2.0)
    with pytest.raises(BadAmax, match=r"no amax for transformer_blocks\.0\.attn\.q.*attention: bf16"):
        checked_attentions(amax, attentions)
    new = tmp_path / "new.json"
    new.write_text(json.dumps({f"{FIRST}.{operand}": 3.0 for operand in "qkv"}))
    assert merged([old, new], linears, attentions).amax[f"{FIRST}.k"] == 3.0


def test_a_recipe_writes_the_measured_scales_and_the_manifest_tells_of_them(
    digits: Path, five_calls: Path, fp8_attention_digits: Path, tmp_path: Path
) -> None:
    quantize(digits, tmp_path / "plain", recipe="nvfp4-ptq", calibration=five_calls)
    checkpoint, plain = read(fp8_attention_digits), read(tmp_path / "plain")
    attentions = plain.family.attentions(plain.config)
    assert checkpoint.fp8_attentions == attentions
    assert checkpoint.manifest["attention"] == {"fp8": list(attentions)}
    assert checkpoint.manifest["recipe"]["attention"] == "fp8"
    largest = _given_to_attention(digits, five_calls, attentions)
    for path in attentions:
        for operand in "qkv":
            scale = checkpoint.tensor(f"{path}.{operand}_scale")
            assert scale == fp8.tensor_scale(largest[f"{path}.{operand}"])
            amax = checkpoint.manifest["amax"][f"{path}.{operand}_bmm_quantizer"]
            assert amax == pytest.approx(largest[f"{path}.{operand}"])
    # Nothing else differs from the checkpoint without it.
    scales = {f"{path}.{name}" for path in attentions for name in SCALES}
    assert checkpoint.tensors.keys() - plain.tensors.keys() == scales
    assert all((checkpoint.tensors[name].bytes() == plain.tensors[name].bytes()).all() for name in plain.tensors)


def _given_to_attention(digits: Path, inputs: Path, attentions: Sequence[str]) -> dict[str, float]:
    """Return what the plain model gives torch's attention on captured inputs."""
    model = load_source(digits)
    with OperandAmax(attentions) as operands, torch.no_grad():
        for call in load_inputs(inputs):
            model(**call)
    return operands.amax


def test_a_method_that_quantizes_block_by_block_gets_the_same_scales(
    digits: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    checkpoint = read(quantized_digits)
    attentions = checkpoint.family.attentions(checkpoint.config)
    calls = load_inputs(quantized_digits / "calibration" / "inputs.safetensors")[::10]
    formats = dict.fromkeys(checkpoint.quantized, "nvfp4")

    def method(task: BlockTask) -> BlockResult:
        task.run()
        with torch.no_grad():
            task.linear(f"{task.path}.attn.to_q").weight.mul_(2)  # a method may change the block once it has run
        task.run()
        return BlockResult({})

    with prepared_by_block(digits, calls, formats, method, {}, tmp_path / "blocks", fp8_attentions=attentions) as made:
        found = {name: float(tensor.tensor()) for name, tensor in made.tensors.items()}
    with measured_by_block(digits, calls, tmp_path / "amax") as amax:
        expected = {name: float(value) for name, value in attention_scales(amax, attentions).items()}
    assert found == expected


def test_old_maxima_and_a_recipe_with_attention_in_fp8_are_one_clear_line(
    digits: Path, quantized_digits: Path, fp8_attention_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(dict.fromkeys(read(quantized_digits).quantized, 2.0)))
    command = ["quantize", str(digits), "-o", str(tmp_path / "out"), "--recipe", str(fp8_attention_recipe)]
    assert fp4trt.run([*command, "--calibration", str(old)]) == 2
    warning, line = capsys.readouterr().err.splitlines()
    assert "which weights" in warning or "measured" in warning
    assert "no amax for transformer_blocks.0.attn.q" in line
    assert "attention: bf16" in line
    assert not (tmp_path / "out").exists()


def test_where_no_attention_is_to_be_in_fp8_nothing_is_measured() -> None:
    x = torch.ones(1, 1, 4, 8)
    with OperandAmax(()) as watched:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    assert watched.amax == {}


@pytest.mark.parametrize("name", ["qwen-image", "krea2", "chroma"])
def test_a_model_whose_attentions_all_have_a_mask_refuses_them_in_fp8(
    name: str, fp8_attention_recipe: Path, tmp_path: Path
) -> None:
    MODELS[name].save(tmp_path / "source")
    with pytest.raises(BadRecipe, match=rf"attention: fp8, and {name} has no attention for that: all .* have a mask"):
        quantize(tmp_path / "source", tmp_path / "out", recipe=fp8_attention_recipe, calibration=tmp_path / "amax.json")
    assert not (tmp_path / "out").exists()


def test_attentions_with_a_mask_stay_in_16_bit_beside_others_in_fp8_and_that_is_said(
    fp8_attention_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MODELS["ltx2"].save(tmp_path / "source")
    config = load_json(tmp_path / "source" / "config.json")
    family = family_of(config)
    amax = dict.fromkeys(family.quantized(config), 4.0)
    amax |= {f"{path}.{operand}": 8.0 for path in family.attentions(config) for operand in "qkv"}
    (tmp_path / "amax.json").write_text(json.dumps(amax))
    quantize(tmp_path / "source", tmp_path / "out", recipe=fp8_attention_recipe, calibration=tmp_path / "amax.json")
    assert "attentions with a mask stay in 16 bit, as FP8 takes none: attn2 and audio_attn2 of each block" in (
        capsys.readouterr().err
    )
    in_fp8 = read(tmp_path / "out").fp8_attentions
    assert [path.rpartition(".")[2] for path in in_fp8[:4]] == [
        "attn1", "audio_attn1", "audio_to_video_attn", "video_to_audio_attn"
    ]  # fmt: skip

    tensors = load_file(tmp_path / "out" / WEIGHTS)
    masked = "transformer_blocks.1.attn2"
    for leaf in ("q_scale", "v_bmm_quantizer._amax"):
        save_file(tensors | {f"{masked}.{leaf}": torch.ones(())}, tmp_path / "out" / WEIGHTS)
        with pytest.raises(BadCheckpoint, match=rf"has {masked}\.{leaf}, .* {masked} has a mask, which FP8 does not"):
            read(tmp_path / "out")
