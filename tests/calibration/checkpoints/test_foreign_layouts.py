"""ModelOpt's own options for ComfyUI give checkpoints that are refused, its plain export one that is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from calibration.checkpoints.quantized import WEIGHTS
from fp4trt.checkpoint_folder import metadata_in_folder, tensors_in_folder
from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json
from fp4trt.layouts import Layout, recognised, refuse_foreign_layout

EVIDENCE = "quantization_config in the safetensors header"


@pytest.fixture
def exported(quantized_digits: Path, tmp_path: Path):
    """Return what does to the built-in model what ModelOpt's unified export does at its end, with its options."""
    from modelopt.torch.export.unified_export_hf import _postprocess_safetensors

    def export(**options: object) -> Path:
        for name in ("config.json", WEIGHTS):
            shutil.copy(quantized_digits / name, tmp_path / name)
        described = load_json(tmp_path / "config.json")["quantization_config"]
        _postprocess_safetensors(tmp_path, None, described, **options)
        return tmp_path

    return export


def layout_of(folder: Path) -> Layout:
    return recognised(load_json(folder / "config.json"), metadata_in_folder(folder), tensors_in_folder(folder))


def test_a_plain_export_is_read(exported) -> None:
    assert layout_of(exported()).is_read


@pytest.mark.parametrize(
    "options",
    [
        {"enable_swizzle_layout": True},
        {"enable_swizzle_layout": True, "enable_layerwise_quant_metadata": True},
        {"enable_layerwise_quant_metadata": True},
        {"padding_strategy": "row"},
    ],
    ids=str,
)
def test_an_export_for_comfyui_is_refused_as_what_it_may_be(exported, options: dict[str, object]) -> None:
    folder = exported(**options)
    layout = layout_of(folder)
    assert (layout.name, layout.block_scales, layout.is_read) == ("ModelOpt's export for ComfyUI", "unknown", False)
    with pytest.raises(BadCheckpoint, match="may be swizzled into cuBLAS tiles: export it without") as refused:
        refuse_foreign_layout(str(folder), {}, metadata_in_folder(folder), tensors_in_folder(folder))
    assert EVIDENCE in str(refused.value)


def test_swizzled_scales_of_an_odd_size_give_the_export_away(exported) -> None:
    from modelopt.torch.export.diffusers_utils import swizzle_nvfp4_scales

    state = {
        "x.weight": torch.zeros(16, 32, dtype=torch.uint8),
        "x.weight_scale": torch.ones(16, 4).to(torch.float8_e4m3fn),
        "x.weight_scale_2": torch.tensor(1.0),
    }
    swizzle_nvfp4_scales(state)
    folder = exported(enable_swizzle_layout=True)
    odd = {name: Tensor(value) for name, value in state.items()}
    layout = recognised({}, metadata_in_folder(folder), tensors_in_folder(folder) | odd)
    assert (layout.block_scales, layout.nibbles) == ("cuBLAS 128x4 tiles", "low first")
    assert "x.weight_scale is F8_E4M3[128, 4] for weights [16, 64]: padded to tiles" in layout.evidence


class Tensor:
    """What a header says of a tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        names = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
        self.dtype, self.shape = names[tensor.dtype], tuple(tensor.shape)


def test_metadata_are_those_that_the_safetensors_library_reads(exported) -> None:
    from safetensors import safe_open

    folder = exported(enable_swizzle_layout=True, enable_layerwise_quant_metadata=True)
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert metadata_in_folder(folder) == file.metadata()
    assert json.loads(metadata_in_folder(folder)["_quantization_metadata"])["format_version"] == "1.0"
