"""Linears in FP8 beside NVFP4 and BF16 in one checkpoint: read, checked, and loaded into torch."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibration.by_block.quantize_blocks import BlockResult, BlockTask
from calibration.checkpoints import layout
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import WEIGHTS, load, read
from calibration.formats import fp8, nvfp4
from calibration.formats.modelopt_backend import FP8, NVFP4, mto, mtq
from calibration.inputs.captured import save_inputs
from calibration.methods import registry
from calibration.quantization import quantize
from calibration.recipes.recipe import load_recipe
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import BadCheckpoint
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import TensorPlan, sha256_of, tensors_in_file, write

FIRST = "transformer_blocks.0.norm1.linear"


def is_modulation(path: str) -> bool:
    """Whether the recipe of ``fp8_digits`` has a linear in FP8."""
    return fnmatch.fnmatchcase(path, "*.norm*.linear")


@pytest.fixture
def copy(fp8_digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fp8_digits, tmp_path / "copy")


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a checkpoint: name to (dtype, shape, bytes)."""
    stored = tensors_in_file(folder / WEIGHTS)
    tensors: dict[str, Any] = {name: (each.dtype, each.shape, each.bytes()) for name, each in stored.items()}
    change(tensors)
    plan = [TensorPlan(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    write(folder / WEIGHTS, plan, ((name, data) for name, (_, _, data) in tensors.items()), {"format": "pt"})


def test_the_tensors_tell_which_linears_are_in_which_format(fp8_digits: Path) -> None:
    checkpoint = read(fp8_digits)
    assert len(checkpoint.fp8) == 3
    assert all(is_modulation(path) for path in checkpoint.fp8)
    assert not set(checkpoint.fp8) & set(checkpoint.quantized)
    assert {*checkpoint.fp8, *checkpoint.quantized} == set(checkpoint.family.quantized(checkpoint.config))
    assert [path for group in checkpoint.groups for path in group] == list(checkpoint.quantized)


def test_a_linear_in_fp8_computes_with_the_rounded_weight_of_the_source(fp8_digits: Path, digits: Path) -> None:
    model, source = load(fp8_digits), load_source(digits)
    kinds = {path: model.get_submodule(path).format for path in read(fp8_digits).family.quantized(source.config)}
    assert {path for path, kind in kinds.items() if kind == "fp8"} == {path for path in kinds if is_modulation(path)}
    assert {kind for path, kind in kinds.items() if not is_modulation(path)} == {"nvfp4"}
    weight = source.get_submodule(FIRST).weight.detach()
    scale = fp8.tensor_scale(weight.abs().max().float())
    assert torch.equal(model.get_submodule(FIRST).weight, fp8.fake_quantize(weight, scale))
    slow = fp8.quantize_reference(weight.float().numpy(), scale.numpy())
    np.testing.assert_array_equal(read(fp8_digits).raw(f"{FIRST}.weight").view(np.uint8), slow)


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale"])
def test_a_scale_that_is_missing_or_not_one_number_is_refused(scale: str, copy: Path) -> None:
    _rewrite(copy, lambda tensors: tensors.update({f"{FIRST}.{scale}": ("F32", (2,), np.zeros(8, np.uint8))}))
    with pytest.raises(BadCheckpoint, match=rf"{FIRST}.{scale} is F32\[2\].*expected one F32"):
        read(copy)
    _rewrite(copy, lambda tensors: tensors.pop(f"{FIRST}.{scale}"))
    with pytest.raises(BadCheckpoint, match=f"lacks {FIRST}.{scale}; expected FP8 codes"):
        read(copy)


def test_a_promise_of_fp8_that_the_tensors_do_not_keep_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["quantized"]["fp8"].append("transformer_blocks.0.ff.net.2")
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"no FP8 weights for transformer_blocks.0.ff.net.2, which its fp4trt.json"):
        read(copy)
    manifest["quantized"]["fp8"] = 3
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"quantized.fp8 is .*, expected a list of strings"):
        read(copy)


def _fake_quantized(source: nn.Module, manifest: dict[str, Any]) -> nn.Module:
    """Return ModelOpt's own model in both formats, with the amax values of a manifest."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": name, "cfg": FP8 if is_modulation(name.rpartition(".")[0]) else NVFP4, "enable": True}
        for name in manifest["amax"]
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(source, {"quant_cfg": entries, "algorithm": "max"})
    for name, amax in manifest["amax"].items():
        source.get_submodule(name).amax = torch.tensor(amax)
    return source


def test_a_modelopt_state_of_both_formats_gives_the_same_checkpoint(
    fp8_digits: Path, digits: Path, tmp_path: Path
) -> None:
    """The built-in model's groups share their amax values already in the manifest."""
    manifest = json.loads((fp8_digits / MANIFEST).read_text(encoding="utf-8"))
    model = _fake_quantized(load_source(digits), manifest)
    mto.save(model, tmp_path / "state.pt")
    recipe = fp8_digits.parent / "recipe.yaml"
    quantize(digits, tmp_path / "again", recipe=recipe, modelopt_state=tmp_path / "state.pt", trust=True)
    assert sha256_of(tmp_path / "again" / WEIGHTS) == sha256_of(fp8_digits / WEIGHTS)
    with pytest.raises(BadCheckpoint, match=r"has num_bits \(4, 3\); expected NVFP4 in blocks of 16"):
        quantize(digits, tmp_path / "other", recipe="nvfp4-ptq", modelopt_state=tmp_path / "state.pt", trust=True)
    found, theirs = load(fp8_digits), model
    inputs = read(fp8_digits).family.example_inputs(load_json(digits / "config.json"), (2, 16, 8), 0, torch.bfloat16)
    with torch.no_grad():
        ours, wanted = (each(**inputs, return_dict=False)[0].float() for each in (found, theirs))
    # ModelOpt multiplies by 448 / amax: a code at a tie may be the other one, and moves what comes after it.
    assert float((ours - wanted).norm() / wanted.norm()) < 0.05


def _mixed(tiny_flux: Callable[..., Path], folder: Path) -> tuple[Path, Path, dict[str, float]]:
    """Return a tiny FLUX, a recipe with its groups in FP8, FP4 and BF16 in turn, and its amax, in amax.json too."""
    flux = tiny_flux(folder / "flux", num_layers=2, num_single_layers=2)
    config = load_json(flux / "config.json")
    family, kinds = family_of(config), itertools.cycle(["fp8", "nvfp4", "bf16"])
    groups = zip(family.groups(config), kinds, strict=False)
    rules = [{"linears": path, "format": kind} for group, kind in groups for path in group]
    recipe = {"name": "mixed", "method": {"name": "ptq"}, "formats": {"rules": rules}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    amax = {path: 1 + index / 7 for index, path in enumerate(family.quantized(config))}
    (folder / "amax.json").write_text(json.dumps(amax), encoding="utf-8")
    return flux, folder / "recipe.yaml", amax


def test_what_is_written_does_not_depend_on_shards(
    tiny_flux: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every group of a tiny FLUX in another format, q/k/v in FP8 too, in one file and in many."""
    flux, recipe, amax = _mixed(tiny_flux, tmp_path)
    quantize(flux, tmp_path / "one", recipe=recipe, calibration=tmp_path / "amax.json")
    plan = layout.plan_shards
    monkeypatch.setattr(layout, "plan_shards", lambda *given: plan(*given, limit=24_000))
    quantize(flux, tmp_path / "many", recipe=recipe, calibration=tmp_path / "amax.json")
    one, many = read(tmp_path / "one"), read(tmp_path / "many")
    assert len({tensor.file for tensor in many.tensors.values()}) > 2
    assert one.tensors.keys() == many.tensors.keys()
    assert all(one.raw(name).tobytes() == many.raw(name).tobytes() for name in one.tensors)
    assert all(
        t.offset % {"F32": 4, "BF16": 2}.get(t.dtype, 1) == 0 for t in (*one.tensors.values(), *many.tensors.values())
    )
    source = tensors_in_folder(flux)
    for group in one.groups_of(one.fp8):
        weights = {path: source[f"{path}.weight"].tensor().float() for path in group}
        scale = np.float32(max(weight.abs().max() for weight in weights.values())) / np.float32(448)
        for path, weight in weights.items():
            np.testing.assert_array_equal(
                one.raw(f"{path}.weight").view(np.uint8), fp8.quantize_reference(weight.numpy(), scale)
            )
            assert one.raw(f"{path}.weight_scale") == scale
            assert one.raw(f"{path}.input_scale") == np.float32(max(amax[other] for other in group)) / np.float32(448)
    assert one.manifest["quantized"] == {"nvfp4": list(one.quantized), "fp8": list(one.fp8)}
    assert load_recipe(recipe).formats.rules[0].format == "fp8"


def test_a_resumed_run_knows_what_each_tensor_of_the_source_became(fp8_digits: Path, digits: Path) -> None:
    checkpoint = read(fp8_digits)
    groups = checkpoint.family.groups(checkpoint.config)
    results = layout.results_of(tensors_in_folder(digits), groups, checkpoint.formats)
    assert sorted(results) == sorted(checkpoint.tensors)


def test_what_a_method_prepared_in_both_formats_is_kept_as_it_is(
    tiny_flux: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that rounds each block as the one pass does gives the same files, and the same maxima."""
    flux, recipe, amax = _mixed(tiny_flux, tmp_path)

    def rounded(task: BlockTask) -> BlockResult:
        task.run()
        tensors: dict[str, torch.Tensor] = {}
        found: dict[str, float] = {}
        for group in task.groups:
            weights = {path: task.linear(path).weight.detach() for path in group}
            largest = max(weight.abs().max().float() for weight in weights.values())
            given = max(amax[path] for path in group)
            for path, weight in weights.items():
                if task.linears[path] == "fp8":
                    scale, read = fp8.tensor_scale(largest), fp8.tensor_scale(given)
                    tensors |= {f"{path}.weight": fp8.quantize(weight, scale), f"{path}.weight_scale": scale}
                else:
                    scale, read = nvfp4.global_scale(largest), nvfp4.global_scale(given)
                    codes, tensors[f"{path}.weight_scale"] = nvfp4.quantize(weight, scale)
                    tensors |= {f"{path}.weight": nvfp4.pack_codes(codes), f"{path}.weight_scale_2": scale}
                tensors[f"{path}.input_scale"] = read
                found |= {f"{path}.input_quantizer": given, f"{path}.weight_quantizer": float(largest)}
        return BlockResult(tensors, amax=found)

    quantize(flux, tmp_path / "packed", recipe=recipe, calibration=tmp_path / "amax.json")
    config = load_json(flux / "config.json")
    call = family_of(config).example_inputs(config, (1, 16, 8), 0, torch.bfloat16)
    save_inputs(tmp_path / "inputs.safetensors", [call])
    monkeypatch.setattr(registry, "needs_activations", lambda _: True)
    monkeypatch.setattr(registry, "of_block", lambda *_: rounded)
    quantize(flux, tmp_path / "prepared", recipe=recipe, calibration=tmp_path / "inputs.safetensors")
    assert sha256_of(tmp_path / "prepared" / WEIGHTS) == sha256_of(tmp_path / "packed" / WEIGHTS)
    packed, prepared = (read(tmp_path / name).manifest["amax"] for name in ("packed", "prepared"))
    assert packed == prepared
