"""``fp4trt convert``: at real width, to an engine, on the command line, and what it refuses and leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import exporter
import fp4trt
import onnx_functions
import trt_build
from calibration import read
from calibration.formats import nvfp4
from calibration.interchange.byte_rows import held
from calibration.interchange.fused import Fused
from calibration.interchange.provenance import Provenance
from calibration.interchange.single_file import comfyui_linear
from calibration.interchange.unified import Unified
from calibration.interchange.writing import write_tensors
from fp4trt.errors import BadAmax, BadCheckpoint, BadOption, OutputExists, WrongPrecision
from fp4trt.json_file import load_json
from fp4trt.number_formats import NVFP4
from fp4trt.single_files.names import Part
from tests.calibration.interchange import foreign
from tests.frame.test_lazy import WITHOUT_TORCH

WHOLE = "diffusion_pytorch_model.safetensors"
PATH = "double_blocks.0.img_attn.qkv"
QKV = tuple(f"transformer_blocks.0.attn.to_{one}" for one in "qkv")
Change = Callable[[dict[str, torch.Tensor]], object]


def linear_of(weight: torch.Tensor) -> tuple[Fused, torch.Tensor]:
    """Return a linear [N, K] in NVFP4 as fp4trt stores it, and its dequantized weight."""
    stored = nvfp4.stored(weight, nvfp4.global_scale(weight.abs().max()))
    stored["input_scale"] = torch.tensor(4 / 2688)
    dtypes = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    tensors = {
        f"x.{leaf}": held(dtypes[value.dtype], tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy())
        for leaf, value in stored.items()
    }
    nothing: Any = None
    checkpoint = Unified(Path(), {}, tensors, nothing, Provenance())
    shape = weight.shape[0], weight.shape[1]
    return Fused(PATH, shape, (Part("x.weight", shape),), NVFP4, checkpoint), nvfp4.restored(stored)


@pytest.mark.parametrize("shape", [(3072, 3072), (50, 48)], ids=str)
def test_comfy_kitchen_reads_a_linear_bit_for_bit_at_real_width_and_where_it_is_padded(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    package = foreign.comfy_kitchen()
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(shape)).bfloat16()
    linear, wanted = linear_of(weight)
    tensors = dict(comfyui_linear(linear))
    tracemalloc.start()
    write_tensors(tmp_path / "x.safetensors", tensors, {}, lambda _: None)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    stored = load_file(tmp_path / "x.safetensors")
    codes, scales, scale = (stored[f"{PATH}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2"))
    found = package.dequantize_nvfp4(codes, scale, scales, torch.float32)
    assert torch.equal(found[: shape[0], : shape[1]], wanted)
    theirs, params = package.tensor.nvfp4.TensorCoreNVFP4Layout.quantize(weight, scale=scale)
    assert torch.equal(theirs, codes)
    assert torch.equal(params.block_scale.view(torch.uint8), scales.view(torch.uint8))


def test_comfy_kitchen_rounds_an_activation_to_the_same_codes() -> None:
    package = foreign.comfy_kitchen()
    torch.manual_seed(1)
    value, scale = 1.3 * torch.randn(256, 3072), nvfp4.global_scale(4.5)
    theirs, blocks = package.quantize_nvfp4(value, scale)
    codes, scales = nvfp4.quantize(value, scale)
    assert torch.equal(package.swap_nibbles(theirs), nvfp4.pack_codes(codes))
    assert torch.equal(package.from_blocked(blocks, 256, 192).view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.slow
def test_a_file_of_comfyui_becomes_an_engine_with_every_linear_in_fp4(
    digits: Path, input_amax: Mapping[str, float], tmp_path: Path
) -> None:
    theirs = foreign.single_file(tmp_path / "theirs.safetensors", digits, input_amax)
    converted = fp4trt.convert(theirs, tmp_path / "ours", to="modelopt", like=digits)
    assert converted["formats"] == {"nvfp4": 20}
    exporter.export(tmp_path / "ours")
    assert onnx_functions.lint(tmp_path / "ours").findings == ()
    report = onnx_functions.validate(tmp_path / "ours")
    assert report.passed, [gate.line for gate in report.failures]
    engine = trt_build.build(tmp_path / "ours", gpu="rtx5090")
    assert (engine["fp4_linears"], engine["quantized_linears"], engine["lost"]) == (20, 20, [])
    assert engine["fp4_gemms"] == 13
    assert fp4trt.inspect(tmp_path / "ours")["recipe"] == "converted"


def test_the_command_names_its_result_and_tells_where_it_comes_from_without_torch(
    quantized_digits: Path, tmp_path: Path
) -> None:
    (tmp_path / "flux-fp4").symlink_to(quantized_digits)
    script = f"{WITHOUT_TORCH}\nimport fp4trt\nsys.exit(fp4trt.run(sys.argv[1:]))"
    command = [sys.executable, "-c", script, "convert", "flux-fp4", "--to", "comfyui", "--json", "-o"]
    environment = {**os.environ, "PYTHONPATH": str(Path(fp4trt.__file__).parents[1])}
    printed = []
    for name in ("one.safetensors", "two.safetensors"):
        done = subprocess.run(
            [*command, name], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr
        printed.append(json.loads(done.stdout))
    one, two = (tmp_path / name for name in ("one.safetensors", "two.safetensors"))
    assert one.read_bytes() == two.read_bytes()
    assert printed[0]["output"] == str(one.resolve())
    assert (printed[0]["layout_from"], printed[0]["layout_to"]) == ("modelopt", "comfyui")
    assert (printed[0]["recipe"], printed[0]["formats"], printed[0]["branch"]) == ("nvfp4-ptq", {"nvfp4": 20}, None)
    with safe_open(one, "pt") as file:
        said = json.loads(file.metadata()["fp4trt"])
    manifest = json.loads((quantized_digits / "fp4trt.json").read_text(encoding="utf-8"))
    assert said["source"] == {name: digest for name, digest in manifest["files"].items() if "/" not in name}
    assert (said["version"], said["layout"], said["recipe"]) == (fp4trt.__version__, "comfyui", "nvfp4-ptq")
    assert said["error"] == {"weights": manifest["sharing_cost"]["weight_shared"]}
    assert str(tmp_path) not in json.dumps(said)


def test_amax_of_attention_as_modelopt_has_them_become_scales(fp8_attention_digits: Path, tmp_path: Path) -> None:
    tensors = load_file(fp8_attention_digits / WHOLE)
    scales = {name: value for name, value in tensors.items() if name.endswith(("q_scale", "k_scale", "v_scale"))}
    assert scales
    for name in scales:
        path, _, leaf = name.rpartition(".")
        tensors[f"{path}.{leaf[0]}_bmm_quantizer._amax"] = 448 * tensors.pop(name)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(tensors, theirs / WHOLE, {"format": "pt"})
    config = load_json(fp8_attention_digits / "config.json")
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    (theirs / "config.json").write_text(json.dumps(config), encoding="utf-8")
    fp4trt.convert(theirs, tmp_path / "ours", to="modelopt")
    ours = load_file(tmp_path / "ours" / WHOLE)
    assert all(torch.allclose(ours[name], value, rtol=1e-6) for name, value in scales.items())
    assert len(read(tmp_path / "ours").fp8_attentions) == 2


def test_a_result_has_a_name_of_its_own(quantized_digits: Path, tmp_path: Path) -> None:
    source = tmp_path / "flux.v1"
    source.mkdir()
    for name in ("config.json", WHOLE, "fp4trt.json"):
        (source / name).write_bytes((quantized_digits / name).read_bytes())
    found = fp4trt.convert(source, to="comfyui")
    assert found["output"] == str(tmp_path / "flux.v1-comfyui.safetensors")
    assert fp4trt.convert(found["output"], to="diffusers")["output"] == str(tmp_path / "flux.v1-comfyui-diffusers")
    with pytest.raises(OutputExists, match=r"exists; choose another --output, or replace it with --force"):
        fp4trt.convert(source, to="comfyui")
    fp4trt.convert(source, to="comfyui", force=True)
    for to, output in (("modelopt", source), ("comfyui", found["output"])):
        with pytest.raises(OutputExists, match=r"is, or holds, the checkpoint that is converted"):
            fp4trt.convert(output, output, to=to, force=True)
    with pytest.raises(BadOption, match=r"expected a name that ends in \.safetensors"):
        fp4trt.convert(source, tmp_path / "flux.sft", to="bfl")


def test_a_conversion_that_fails_leaves_what_was_there(
    quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.interchange import writing

    kept = tmp_path / "flux.safetensors"
    fp4trt.convert(quantized_digits, kept, to="comfyui")
    before = kept.read_bytes()

    def fail(path: Path, *_: object) -> str:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "write", fail)
    for to, output in (("comfyui", kept), ("modelopt", tmp_path / "new" / "ours"), ("diffusers", tmp_path / "folder")):
        with pytest.raises(OSError, match="No space left"):
            fp4trt.convert(quantized_digits, output, to=to, force=True)
    assert kept.read_bytes() == before
    assert list(tmp_path.iterdir()) == [kept]


def test_a_manifest_of_other_files_is_not_repeated(quantized_digits: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized_digits, tmp_path / "mine", ignore=shutil.ignore_patterns("*.onnx", "validation"))
    manifest = json.loads((tmp_path / "mine" / "fp4trt.json").read_text())
    manifest["files"]["diffusion_pytorch_model.safetensors"] = "0" * 64
    (tmp_path / "mine" / "fp4trt.json").write_text(json.dumps(manifest))
    with pytest.raises(BadCheckpoint, match=r"is not the file that fp4trt.json describes"):
        fp4trt.convert(tmp_path / "mine", tmp_path / "x.safetensors", to="comfyui")


def test_a_file_that_convert_did_not_write_is_never_replaced(quantized_digits: Path, tmp_path: Path) -> None:
    mine = tmp_path / "flux.safetensors"
    mine.write_bytes((quantized_digits / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(OutputExists, match="was not written by fp4trt convert, and --force does not replace it"):
        fp4trt.convert(quantized_digits, mine, to="comfyui", force=True)
    assert mine.read_bytes() == (quantized_digits / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def theirs(
    digits: Path, input_amax: Mapping[str, float], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return what writes a file of ComfyUI's with some tensors changed."""
    folder = tmp_path_factory.mktemp("theirs")
    whole = foreign.single_file(folder / "whole.safetensors", digits, input_amax)

    def write(change: Change, metadata: Mapping[str, str] | None = None) -> Path:
        tensors = load_file(whole)
        change(tensors)
        save_file(tensors, folder / "changed.safetensors", dict(metadata or {}))
        return folder / "changed.safetensors"

    return write


def mark(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "a damaged mark": (
        lambda t: t.update({f"{PATH}.comfy_quant": mark('{"format"')}),
        BadCheckpoint,
        "has a damaged mark of ComfyUI's",
    ),
    "a mark of another format": (
        lambda t: t.update({f"{PATH}.comfy_quant": mark('{"format": "svdquant_w4a4"}')}),
        BadCheckpoint,
        f"marks {PATH} with format 'svdquant_w4a4', and its tensors are NVFP4's; expected what they are, one of nvfp4,",
    ),
    "a mark with more than is known": (
        lambda t: t.update({f"{PATH}.comfy_quant": mark('{"format": "nvfp4", "convrot": true}')}),
        BadCheckpoint,
        f"marks {PATH} with convrot True",
    ),
    "a mark of what is not quantized": (
        lambda t: t.update({"img_in.comfy_quant": mark('{"format": "nvfp4"}')}),
        BadCheckpoint,
        "marks img_in as 'nvfp4', and has no such weight",
    ),
    "a missing tensor": (
        lambda t: t.pop("img_in.bias"),
        BadCheckpoint,
        "lacks img_in.bias, which holds x_embedder.bias; expected all tensors of a FluxTransformer2DModel",
    ),
    "a missing scale": (
        lambda t: t.pop(f"{PATH}.weight_scale_2"),
        BadCheckpoint,
        f"lacks {QKV[0]}.weight_scale_2; expected NVFP4 codes",
    ),
    "a tensor too many": (
        lambda t: t.update({"double_blocks.0.gate": torch.ones(3)}),
        BadCheckpoint,
        "has double_blocks.0.gate, F32[3], which nothing here reads",
    ),
    "other block scales": (
        lambda t: t.update({f"{PATH}.weight_scale": t[f"{PATH}.weight_scale"][:256].clone()}),
        BadCheckpoint,
        f"{PATH}.weight_scale is F8_E4M3[256, 8] in",
    ),
    "an infinite scale": (
        lambda t: t.update({f"{PATH}.weight_scale_2": torch.tensor(float("inf"))}),
        BadCheckpoint,
        f"{QKV[0]}.weight_scale_2 is inf in",
    ),
    "a smoothed input without a scale": (
        lambda t: (t.pop(f"{PATH}.input_scale"), t.update({f"{PATH}.pre_quant_scale": torch.ones(128)})),
        BadAmax,
        f"{QKV[0]} in",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_is_not_what_it_says_is_refused_in_one_line(
    what: str, theirs: Callable[..., Path], digits: Path, input_amax: Mapping[str, float], tmp_path: Path
) -> None:
    change, error, words = REFUSED[what]
    amax = tmp_path / "amax.json"
    amax.write_text(json.dumps(input_amax), encoding="utf-8")
    with pytest.raises(error) as refused:
        fp4trt.convert(theirs(change), tmp_path / "ours", to="modelopt", like=digits, calibration=amax)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == [amax]


def test_what_is_no_quantized_model_of_a_known_class_is_refused(
    theirs: Callable[..., Path], digits: Path, svdquant_checkpoint: Path, tmp_path: Path
) -> None:
    whole = theirs(lambda _: None)
    with pytest.raises(BadCheckpoint, match=r"of other sizes or tensors than its published models.* with --like"):
        fp4trt.convert(whole, tmp_path / "ours", to="modelopt")  # heads of 64, and axes that no published model has
    with pytest.raises(BadOption, match=r"--from says bfl, and .* is comfyui \(the tensor .*comfy_quant\)"):
        fp4trt.convert(whole, tmp_path / "ours", to="modelopt", from_layout="bfl", like=digits)
    with pytest.raises(BadOption, match=r"--from says comfyui, and .* is modelopt \(quant_method modelopt in config"):
        fp4trt.convert(svdquant_checkpoint, tmp_path / "x.safetensors", to="bfl", from_layout="comfyui")
    with pytest.raises(WrongPrecision, match="holds no quantized linear"):
        fp4trt.convert("digits", tmp_path / "ours", to="modelopt")
    save_file({"a.weight": torch.zeros(16, 16, dtype=torch.uint8), "a.weight_scale": torch.ones(16, 2)}, tmp_path / "a")
    with pytest.raises(BadCheckpoint, match=r"holds 2 tensors .* under the names of no model that is known"):
        fp4trt.convert(tmp_path / "a", tmp_path / "ours", to="modelopt")
    fp4trt.convert(svdquant_checkpoint, tmp_path / "svd.safetensors", to="comfyui")
    branch = tmp_path / "svd-branch.safetensors"
    with pytest.raises(OutputExists, match=r"svd-branch\.safetensors is, or holds, the checkpoint that is converted"):
        fp4trt.convert(tmp_path / "svd.safetensors", branch, to="comfyui", force=True)
    save_file(load_file(branch), branch)
    with pytest.raises(BadCheckpoint, match=r"svd-branch\.safetensors was not written with svd\.safetensors"):
        fp4trt.convert(tmp_path / "svd.safetensors", tmp_path / "ours", to="modelopt")
    branch.unlink()
    with pytest.raises(
        BadCheckpoint, match=r"has its low-rank branches in svd-branch\.safetensors, which is not beside"
    ):
        fp4trt.convert(tmp_path / "svd.safetensors", tmp_path / "ours", to="modelopt")
