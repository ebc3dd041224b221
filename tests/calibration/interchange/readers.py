"""What other programs make of a converted file, against what fp4trt makes of the checkpoint that it was made from.

Each returns the largest difference of any weight, or the relative L2 of an output: 0.0 where nothing is lost.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from calibration import load, read
from calibration.checkpoints.quantized import Checkpoint
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from tests.calibration.interchange.foreign import FUSED, comfy_kitchen

__all__ = ["by_comfy_kitchen", "by_diffusers", "by_torchao", "of_other_programs", "same_files", "same_weights"]

Tensors = Mapping[str, torch.Tensor]


def by_comfy_kitchen(file: Path, checkpoint: Path, dtype: torch.dtype = torch.float32) -> float:
    """Dequantize every linear of a file for ComfyUI, the smoothing of its input and its branch with it."""
    stored, reference = load_file(file), read(checkpoint)
    beside = file.with_name(f"{file.stem}-branch.safetensors")
    branches = load_file(beside) if beside.exists() else {}
    worst = 0.0
    for path, parts in FUSED.items():
        weight = _by_mark(stored, path, dtype)
        wanted = torch.cat([reference.weight(part) for part in parts]).to(dtype)
        worst = max(worst, _difference(weight, wanted))
        worst = max(worst, _branch(branches, stored, path, [_factors(reference, part) for part in parts]))
    plain = {"img_in.weight": "x_embedder.weight", "final_layer.linear.bias": "proj_out.bias"}
    assert all(torch.equal(stored[name], reference.tensor(theirs)) for name, theirs in plain.items())
    scale, shift = reference.tensor("norm_out.linear.weight").chunk(2)
    assert torch.equal(stored["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))
    return worst


def _by_mark(stored: Tensors, path: str, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a linear as its mark says."""
    package, mark = comfy_kitchen(), json.loads(bytes(stored[f"{path}.comfy_quant"].tolist()))
    weight, scale = stored[f"{path}.weight"], stored[f"{path}.weight_scale"]
    if mark["format"] == "nvfp4":
        return package.dequantize_nvfp4(weight, stored[f"{path}.weight_scale_2"], scale, dtype)
    if mark["format"] == "mxfp8":
        return package.dequantize_mxfp8(weight, scale.view(torch.float8_e8m0fnu), dtype)
    assert mark["format"] == "float8_e4m3fn"
    return package.dequantize_per_tensor_fp8(weight, scale, dtype)


def of_other_programs(folder: Path, file: Path, is_row_major: bool) -> float:
    """Compare what was made of another program's file with what that program makes of it."""
    from diffusers.quantizers.bfl import utils as bfl

    found = read(folder)
    stored = {name.removeprefix("model.diffusion_model."): value for name, value in load_file(file).items()}
    worst = 0.0
    for path, parts in FUSED.items():
        if is_row_major:
            tensors = (stored[f"{path}.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2"))
            wanted = bfl.dequantize_nvfp4(*tensors)
        else:
            wanted = _by_mark({f"{path}.comfy_quant": _NVFP4, **stored}, path, torch.float32)
        worst = max(worst, _difference(torch.cat([found.weight(part) for part in parts]), wanted))
        scale = stored.get(f"{path}.input_scale")
        assert all(scale is None or torch.equal(found.tensor(f"{part}.input_scale"), scale) for part in parts)
        bias = torch.cat([found.tensor(f"{part}.bias") for part in parts])
        assert torch.equal(bias, stored[f"{path}.bias"])
    scale, shift = found.tensor("norm_out.linear.weight").chunk(2)
    assert torch.equal(stored["final_layer.adaLN_modulation.1.weight"], torch.cat((shift, scale)))
    return worst


_NVFP4 = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)


def _factors(reference: Checkpoint, path: str) -> dict[str, torch.Tensor]:
    leaves = ("svdquant_lora_a", "svdquant_lora_b", "pre_quant_scale")
    return {leaf: reference.tensor(name) for leaf in leaves if (name := f"{path}.{leaf}") in reference.tensors}


def _branch(branches: Tensors, stored: Tensors, path: str, parts: list[dict[str, torch.Tensor]]) -> float:
    """Compare what a bypass of the packed weight adds, which reads the input before it is smoothed."""
    if "pre_quant_scale" in parts[0]:
        assert torch.equal(stored[f"{path}.pre_quant_scale"], parts[0]["pre_quant_scale"])
    if "svdquant_lora_a" not in parts[0]:
        return 0.0
    a, b = (branches[f"diffusion_model.{path}.lora_{one}.weight"] for one in "AB")
    smoothing = parts[0].get("pre_quant_scale", torch.ones(()))
    wanted = torch.cat([part["svdquant_lora_b"].double() @ part["svdquant_lora_a"].double() for part in parts])
    return _difference(b.double() @ a.double(), wanted * smoothing.double())


def by_diffusers(file: Path, checkpoint: Path, config: Path) -> float:
    """Load a file by diffusers' BFL quantizer, and compute in FP32 on FP32 inputs."""
    import diffusers

    config_of = load_json(config / "config.json")
    model_class: Any = getattr(diffusers, config_of["_class_name"])
    model = model_class.from_single_file(
        str(file),
        config=str(config),
        quantization_config=diffusers.BFLQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    inputs = family_of(config_of).example_inputs(config_of, (1, 16, 8), 3, torch.float32)
    ours = load(checkpoint, dtype=torch.float32, quantize_activations=False)
    with torch.no_grad():
        theirs, wanted = (each(**inputs, return_dict=False)[0] for each in (model, ours))
    quantized = sum(type(module).__name__.startswith("BFL") for module in model.modules())
    assert quantized == len(read(checkpoint).formats)
    return float((theirs - wanted).norm() / wanted.norm())


def by_torchao(folder: Path, checkpoint: Path) -> float:
    """Dequantize every NVFP4 linear of a folder in diffusers' names by torchao's tensor."""
    reference, file = read(checkpoint), folder / "diffusion_pytorch_model.safetensors"
    dequantized = file.with_name("dequantized.safetensors")
    apart = Path(sys.prefix) / "readers"
    command = [sys.executable, "-c", _TORCHAO, str(apart), str(file), str(dequantized)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = load_file(dequantized)
    assert theirs.keys() == set(reference.quantized)
    return max(_difference(weight, reference.weight(path)) for path, weight in theirs.items())


_TORCHAO = """
import sys
import torch
from safetensors.torch import load_file, save_file
sys.path.append(sys.argv[1])
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

stored = load_file(sys.argv[2])
scales = {name.removesuffix(".weight_scale_2"): value for name, value in stored.items() if name.endswith("_scale_2")}
save_file({
    path: NVFP4Tensor(
        stored[f"{path}.weight"], stored[f"{path}.weight_scale"], 16, torch.float32, per_tensor_scale=scale
    ).dequantize(torch.float32)
    for path, scale in scales.items()
}, sys.argv[3])
"""
"""A program of its own: where torchao can be imported, diffusers imports it too, which takes seconds and prints."""


def same_files(folder: Path, checkpoint: Path) -> float:
    """Hold every byte of the files of a checkpoint against those of another."""
    ours, theirs = (list(_files(place)) for place in (folder, checkpoint))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [name for (name, one), (_, other) in zip(ours, theirs, strict=True) if one != other] == []
    return 0.0


def same_weights(folder: Path, checkpoint: Path) -> float:
    """Compare the dequantized weights of two checkpoints of the same linears."""
    ours, theirs = read(folder), read(checkpoint)
    assert ours.formats == theirs.formats
    return max(_difference(ours.weight(path), theirs.weight(path)) for path in ours.formats)


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    names = sorted({tensor.file.name for tensor in tensors_in_folder(folder).values()})
    yield from ((name, (folder / name).read_bytes()) for name in (*names, "config.json"))


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
