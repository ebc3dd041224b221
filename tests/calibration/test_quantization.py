"""From a BF16 checkpoint to a quantized one and back into torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from calibration.by_block.calibration import METADATA, calibrate
from calibration.checkpoints import layout
from calibration.checkpoints import quantized as checkpoint
from calibration.checkpoints.plain import load_source
from calibration.formats import nvfp4
from calibration.formats.modelopt_backend import NVFP4, mto, mtq
from calibration.quantization import quantize
from fp4trt.errors import BadAmax, BadCheckpoint, BadInputs, OutputExists, UnknownFamily, Untrusted
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import sha256_of, tensors_in_file

MakeFlux = Callable[..., Path]


def _insert_quantizers(model: nn.Module, input_amax: Mapping[str, float]) -> None:
    """Have ModelOpt quantize these linears: inputs with the given amax values, weights with their own."""
    names = [f"{path}.{kind}" for path in input_amax for kind in ("input_quantizer", "weight_quantizer")]
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": name, "cfg": NVFP4, "enable": True} for name in names]
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"})
    for path, amax in input_amax.items():
        model.get_submodule(f"{path}.input_quantizer").amax = torch.tensor(amax)


def _share_scales(model: nn.Module, groups: Iterable[Sequence[str]]) -> None:
    for group in groups:
        for kind in ("input_quantizer", "weight_quantizer"):
            quantizers: list[Any] = [model.get_submodule(f"{path}.{kind}") for path in group]
            largest = max(float(quantizer.amax) for quantizer in quantizers)
            for quantizer in quantizers:
                quantizer.amax = torch.tensor(largest)


@pytest.fixture(scope="module")
def fake_quantized(digits: Path, quantized_digits: Path) -> nn.Module:
    """The built-in model as ModelOpt fake-quantizes it, with the amax values of the quantized checkpoint."""
    manifest = load_json(quantized_digits / "fp4trt.json")
    config = load_json(digits / "config.json")
    family, model = family_of(config), load_source(digits)
    paths = family.quantized(config)
    _insert_quantizers(model, {path: manifest["amax"][f"{path}.input_quantizer"] for path in paths})
    _share_scales(model, family.groups(config))
    return model


def _example(directory: Path, dtype: torch.dtype = torch.bfloat16, **sizes: int) -> dict[str, torch.Tensor]:
    config = load_json(directory / "config.json")
    wanted = {"batch": 2, "image_tokens": 16, "text_tokens": 8, "seed": 3, **sizes}
    seed = wanted.pop("seed")
    return family_of(config).example_inputs(config, tuple(wanted.values()), seed, dtype)  # type: ignore[arg-type]


def _bytes_of(value: torch.Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_loaded_checkpoint_computes_what_modelopt_fake_quantizes_bit_for_bit(
    fake_quantized: nn.Module, quantized_digits: Path
) -> None:
    loaded = checkpoint.load(quantized_digits)
    with torch.inference_mode():
        for sizes in ({}, {"batch": 1, "image_tokens": 36, "text_tokens": 5}):
            call = _example(quantized_digits, **sizes)
            ours, theirs = loaded(**call)[0], fake_quantized(**call)[0]
            assert torch.equal(ours, theirs)


def test_the_stored_tensors_equal_modelopts_own_unified_export(
    digits: Path, fake_quantized: nn.Module, quantized_digits: Path, tmp_path: Path
) -> None:
    from modelopt.torch.export import export_hf_checkpoint
    from safetensors.torch import load_file

    # ModelOpt's export packs in place, so it gets a copy; its state must travel with it.
    mto.save(fake_quantized, str(tmp_path / "state.pt"))
    model = mto.restore(load_source(digits), str(tmp_path / "state.pt"))
    export_hf_checkpoint(model, export_dir=str(tmp_path / "modelopt"))
    theirs = load_file(tmp_path / "modelopt" / "diffusion_pytorch_model.safetensors")
    ours = load_file(quantized_digits / checkpoint.WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        other = theirs[name]
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        if name.endswith(".weight") and value.dtype == torch.uint8:  # ModelOpt writes -0 as +0
            codes, others = nvfp4.unpack_codes(value), nvfp4.unpack_codes(other)
            assert torch.equal(torch.where(codes == 8, 0, codes), torch.where(others == 8, 0, others)), name
        else:
            assert _bytes_of(value) == _bytes_of(other), name
    config = load_json(quantized_digits / "config.json")
    theirs = load_json(tmp_path / "modelopt" / "config.json")["quantization_config"]
    ours = config["quantization_config"]
    names = [name if name in theirs["ignore"] else name.removesuffix("*") for name in ours["ignore"]]
    assert {**ours, "ignore": names} == theirs


@pytest.mark.slow
def test_quantizing_twice_gives_identical_bytes(
    digits: Path, five_calls: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    quantize(digits, tmp_path / "again", recipe="nvfp4-ptq", calibration=five_calls)
    for name in ("config.json", "fp4trt.json", checkpoint.WEIGHTS, "calibration/inputs.safetensors"):
        assert sha256_of(tmp_path / "again" / name) == sha256_of(quantized_digits / name), name


@pytest.mark.slow
def test_saved_calibration_inputs_and_a_file_of_maxima_repeat_the_weights(
    digits: Path, quantized_digits: Path, tmp_path: Path
) -> None:
    inputs = quantized_digits / "calibration" / "inputs.safetensors"
    calibrate(digits, tmp_path / "amax.json", inputs=inputs)
    quantize(digits, tmp_path / "from-amax", calibration=tmp_path / "amax.json")
    assert sha256_of(tmp_path / "from-amax" / checkpoint.WEIGHTS) == sha256_of(quantized_digits / checkpoint.WEIGHTS)
    quantize(digits, tmp_path / "from-inputs", recipe="nvfp4-ptq", calibration=inputs)
    assert sha256_of(tmp_path / "from-inputs" / checkpoint.WEIGHTS) == sha256_of(quantized_digits / checkpoint.WEIGHTS)
    manifest = load_json(tmp_path / "from-inputs" / "fp4trt.json")
    assert manifest["calibration"]["inputs_sha256"] == hashlib.sha256(inputs.read_bytes()).hexdigest()


def test_the_manifest_tells_hashes_and_no_path_of_this_machine(quantized_digits: Path) -> None:
    manifest = load_json(quantized_digits / "fp4trt.json")
    for name, digest in manifest["files"].items():
        assert sha256_of(quantized_digits / name) == digest
    assert len(manifest["quantized"]["nvfp4"]) == 14 + 6
    assert len(manifest["groups"]) == 10 + 3
    assert str(quantized_digits.parent) not in json.dumps(manifest)
    assert manifest["sharing_cost"]["weight_shared"] < 0.11


def test_bytes_lie_large_elements_first_aligned_and_group_by_group(quantized_digits: Path) -> None:
    stored = checkpoint.read(quantized_digits)
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "F8_E4M3": 1}
    in_file_order = sorted(stored.tensors.items(), key=lambda item: item[1].offset)
    widths = [sizes[tensor.dtype] for _, tensor in in_file_order]
    assert widths == sorted(widths, reverse=True)
    assert all(tensor.offset % sizes[tensor.dtype] == 0 for tensor in stored.tensors.values())
    for group in stored.groups:
        for kind in ("weight", "weight_scale"):
            spans = [stored.tensors[f"{path}.{kind}"] for path in group]
            for before, after in itertools.pairwise(spans):
                assert before.offset + before.nbytes == after.offset


def test_global_scales_are_equal_inside_a_group_and_fit_its_largest_weight(
    digits: Path, quantized_digits: Path
) -> None:
    from safetensors.torch import load_file

    stored, source = checkpoint.read(quantized_digits), load_file(digits / checkpoint.WEIGHTS)
    for group in stored.groups:
        for kind in ("weight_scale_2", "input_scale"):
            assert len({float(stored.raw(f"{path}.{kind}")) for path in group}) == 1
        amax = max(float(source[f"{path}.weight"].abs().max()) for path in group)
        assert float(stored.raw(f"{group[0]}.weight_scale_2")) == pytest.approx(amax / 2688, rel=1e-6)


def test_safetensors_reads_what_we_write_and_we_read_what_it_writes(quantized_digits: Path, digits: Path) -> None:
    from safetensors import safe_open

    for file in (quantized_digits / checkpoint.WEIGHTS, digits / checkpoint.WEIGHTS):
        header = tensors_in_file(file)
        with safe_open(file, "pt") as theirs:
            assert set(theirs.keys()) == set(header)
            for name, tensor in header.items():
                assert _bytes_of(theirs.get_tensor(name)) == tensor.bytes().tobytes()


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, None, "1", True])
def test_a_bad_maximum_is_refused_with_the_layers_name(digits: Path, value: Any, tmp_path: Path) -> None:
    paths = family_of(load_json(digits / "config.json")).quantized(load_json(digits / "config.json"))
    amax: dict[str, Any] = dict.fromkeys(paths, 1.0)
    amax["transformer_blocks.0.ff.net.2"] = value
    (tmp_path / "amax.json").write_text(json.dumps({METADATA: {}, **amax}))
    with pytest.raises(BadAmax, match=r"transformer_blocks\.0\.ff\.net\.2"):
        quantize(digits, tmp_path / "out", calibration=tmp_path / "amax.json")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_inputs_of_another_model_are_refused(tiny_flux: MakeFlux, quantized_digits: Path, tmp_path: Path) -> None:
    source = tiny_flux(tmp_path / "flux")
    with pytest.raises(BadInputs, match="hidden_states has shape"):
        quantize(
            source,
            tmp_path / "out",
            recipe="nvfp4-ptq",
            calibration=quantized_digits / "calibration" / "inputs.safetensors",
        )


@pytest.mark.parametrize("channels", [64, 16])  # the built-in model, which brings its own, has 16
def test_a_flux_checkpoint_needs_calibration_data(channels: int, tiny_flux: MakeFlux, tmp_path: Path) -> None:
    with pytest.raises(BadInputs, match="flux needs calibration data"):
        quantize(tiny_flux(tmp_path / "flux", in_channels=channels), tmp_path / "out")


def test_a_recipe_without_scales_of_inputs_needs_no_calibration_data(tiny_flux: MakeFlux, tmp_path: Path) -> None:
    from calibration.inputs.captured import save_inputs

    source = tiny_flux(tmp_path / "flux")
    result = quantize(source, tmp_path / "out", recipe="mxfp8-ptq")
    assert result.formats == {"mxfp8": result.quantized_linears}
    assert load_json(tmp_path / "out" / "fp4trt.json")["calibration"] == {"data": "none"}
    save_inputs(tmp_path / "inputs.safetensors", [_example(source)])
    quantize(source, tmp_path / "calibrated", recipe="mxfp8-ptq", calibration=tmp_path / "inputs.safetensors")
    for name in (checkpoint.WEIGHTS, "config.json"):
        assert sha256_of(tmp_path / "out" / name) == sha256_of(tmp_path / "calibrated" / name), name
    (tmp_path / "attention.yaml").write_text(
        "name: a\nmethod: {name: ptq}\nformats: {default: mxfp8}\nattention: fp8\n", encoding="utf-8"
    )
    with pytest.raises(BadInputs, match="needs calibration data"):
        quantize(source, tmp_path / "other", recipe=tmp_path / "attention.yaml")


@pytest.mark.parametrize("guidance", [True, False])
def test_a_flux_checkpoint_quantizes_from_captured_inputs(guidance: bool, tiny_flux: MakeFlux, tmp_path: Path) -> None:
    from calibration.inputs.captured import save_inputs

    source = tiny_flux(tmp_path / "flux", guidance_embeds=guidance)
    save_inputs(tmp_path / "inputs.safetensors", [_example(source, seed=seed) for seed in range(3)])
    result = quantize(source, tmp_path / "out", recipe="nvfp4-ptq", calibration=tmp_path / "inputs.safetensors")
    assert result["family"] == "flux"
    assert result["quantized_linears"] == 20
    with torch.inference_mode():
        assert checkpoint.load(tmp_path / "out")(**_example(source))[0].isfinite().all()


def test_a_modelopt_state_is_read_only_when_trusted_and_gives_the_same_weights(
    digits: Path, fake_quantized: nn.Module, quantized_digits: Path, tmp_path: Path
) -> None:
    mto.save(fake_quantized, str(tmp_path / "state.pt"))
    with pytest.raises(Untrusted, match="--trust"):
        quantize(digits, tmp_path / "out", modelopt_state=tmp_path / "state.pt")
    quantize(digits, tmp_path / "out", modelopt_state=tmp_path / "state.pt", trust=True)
    assert sha256_of(tmp_path / "out" / checkpoint.WEIGHTS) == sha256_of(quantized_digits / checkpoint.WEIGHTS)


def test_a_modelopt_state_with_another_selection_of_linears_than_the_recipe_is_refused(
    tmp_path: Path, digits: Path
) -> None:
    model = load_source(digits)
    config = load_json(digits / "config.json")
    paths = family_of(config).quantized(config)
    _insert_quantizers(model, dict.fromkeys(paths[1:], 1.0))
    mto.save(model, str(tmp_path / "state.pt"))
    with pytest.raises(BadCheckpoint, match=r"transformer_blocks\.0\.norm1\.linear.*is not quantized"):
        quantize(digits, tmp_path / "out", recipe="nvfp4-ptq", modelopt_state=tmp_path / "state.pt", trust=True)


@pytest.mark.slow
def test_an_existing_result_is_kept_without_force_and_replaced_with_it(digits: Path, copy_of_digits: Path) -> None:
    with pytest.raises(OutputExists, match="--force"):
        quantize(digits, copy_of_digits)
    quantize(digits, copy_of_digits, recipe="nvfp4-ptq", force=True)
    assert sorted(path.name for path in copy_of_digits.iterdir()) == [
        "calibration",
        "config.json",
        checkpoint.WEIGHTS,
        "fp4trt.json",
    ]


def test_force_does_not_replace_what_fp4trt_did_not_write(
    digits: Path, copy_of_digits: Path, tiny_flux: MakeFlux, tmp_path: Path
) -> None:
    (copy_of_digits / "mine.txt").write_text("keep me")
    with pytest.raises(OutputExists, match=r"mine\.txt"):
        quantize(digits, copy_of_digits, recipe="nvfp4-ptq", force=True)
    source = tiny_flux(tmp_path / "flux")
    with pytest.raises(OutputExists, match=r"config\.json"):
        quantize(digits, source, force=True)
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(OutputExists, match="is a file"):
        quantize(digits, tmp_path / "file", force=True)
    assert (copy_of_digits / "mine.txt").exists()


def test_a_failure_while_writing_leaves_neither_a_result_nor_the_old_one_lost(
    digits: Path, copy_of_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sha256_of(copy_of_digits / checkpoint.WEIGHTS)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout.ShardFiles, "put", full)
    with pytest.raises(OSError, match="No space"):
        quantize(digits, copy_of_digits, recipe="nvfp4-ptq", force=True)
    assert sha256_of(copy_of_digits / checkpoint.WEIGHTS) == before
    assert not copy_of_digits.with_name("digits-fp4.partial").exists()


def _break(directory: Path, how: str) -> None:
    weights = directory / checkpoint.WEIGHTS
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "no weights":
        weights.unlink()
    elif how == "random bytes":
        weights.write_bytes(bytes(range(256)) * 40)
    elif how == "other class":
        (directory / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    elif how == "other config":
        config = load_json(directory / "config.json")
        (directory / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    elif how == "no json":
        (directory / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("truncated", BadCheckpoint, "ends at byte"),
        ("no weights", BadCheckpoint, "does not exist"),
        ("random bytes", BadCheckpoint, "is not a safetensors file"),
        ("other class", UnknownFamily, "UNet2DModel"),
        ("other config", BadCheckpoint, r"transformer_blocks\.1.*absent"),
        ("no json", BadCheckpoint, "is not JSON"),
    ],
)
def test_a_damaged_source_is_refused_in_one_line(
    how: str, error: type[Exception], words: str, tiny_flux: MakeFlux, tmp_path: Path
) -> None:
    source = tiny_flux(tmp_path / "flux")
    _break(source, how)
    with pytest.raises(error, match=words) as caught:
        quantize(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux"]


def test_a_checkpoint_without_one_scale_does_not_load(copy_of_digits: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy_of_digits / checkpoint.WEIGHTS)
    del tensors["transformer_blocks.0.attn.to_k.input_scale"]
    save_file(tensors, copy_of_digits / checkpoint.WEIGHTS)
    with pytest.raises(BadCheckpoint, match=r"transformer_blocks\.0\.attn\.to_k\.input_scale"):
        checkpoint.load(copy_of_digits)
