"""Every layout that others write is known by its names, shapes or metadata, and refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from fp4trt.checkpoint_folder import metadata_in_folder
from fp4trt.errors import BadCheckpoint, UnknownArtifact
from fp4trt.layouts import recognised, refuse_foreign_layout
from fp4trt.safetensors_file import metadata_in_file, tensors_in_file

Q = "transformer_blocks.0.attn.to_q"
QKV = "double_blocks.0.img_attn.qkv"
UNIFIED = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.47.0"}}
FOR_COMFYUI = {"format": "pt", "quantization_config": json.dumps(UNIFIED)}
LAYERS = json.dumps({"format_version": "1.0", "layers": {Q: {"format": "nvfp4"}}})


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]


def nvfp4(path: str, rows: int = 256, columns: int = 128, **more: Tensor) -> dict[str, Tensor]:
    """The tensors of one linear as ModelOpt's unified export and ComfyUI's files both name them."""
    leaves = {
        "weight": Tensor("U8", (rows, columns // 2)),
        "weight_scale": Tensor("F8_E4M3", (rows, columns // 16)),
        "weight_scale_2": Tensor("F32", ()),
        "input_scale": Tensor("F32", ()),
    }
    return {f"{path}.{leaf}": tensor for leaf, tensor in (leaves | more).items()}


def fp8(path: str, dtype: str = "F8_E4M3", **more: Tensor) -> dict[str, Tensor]:
    leaves = {"weight": Tensor(dtype, (256, 128)), "weight_scale": Tensor("F32", ()), "input_scale": Tensor("F32", ())}
    return {f"{path}.{leaf}": tensor for leaf, tensor in (leaves | more).items()}


VECTOR, NUMBER = Tensor("U8", (19,)), Tensor("F32", ())
PLAIN = {f"{Q}.weight": Tensor("BF16", (256, 128))}
PACKED = {f"{Q}.weight_packed": Tensor("U8", (256, 64)), f"{Q}.weight_scale": Tensor("F8_E4M3", (256, 8))}
NUNCHAKU = {f"{Q}.qweight": Tensor("I8", (256, 64)), f"{Q}.wscales": Tensor("F8_E4M3", (8, 256))}

FOREIGN = {
    "ComfyUI, by its tensors": ({}, {}, nvfp4(QKV, comfy_quant=VECTOR), "ComfyUI", f"{QKV}.comfy_quant"),
    "ComfyUI's FP8": ({}, {}, fp8(Q, comfy_quant=VECTOR), "ComfyUI", "FP8 and INT8 under its marks are not read"),
    "ComfyUI, by its header": ({}, {"_quantization_metadata": LAYERS}, nvfp4(Q), "ComfyUI", "_quantization_metadata"),
    "ComfyUI, scales as bytes": ({}, {}, nvfp4(Q, weight_scale=Tensor("U8", (256, 8))), "ComfyUI", "U8[256, 8]"),
    "padded to tiles": (
        {"quantization_config": UNIFIED},
        {},
        nvfp4(Q, 64, weight_scale=Tensor("F8_E4M3", (128, 8))),
        "tiled block scales (ComfyUI's, torchao's, or ModelOpt's for ComfyUI)",
        "F8_E4M3[128, 8] for weights [64, 128]: padded to tiles",
    ),
    "reshaped into tiles, as torchao has them": (
        {},
        {},
        nvfp4(Q, weight_scale=Tensor("F8_E4M3", (64, 32))),
        "tiled block scales",
        "F8_E4M3[64, 32] for weights [256, 128]: padded to tiles",
    ),
    "ModelOpt, swizzled or not": (
        {"quantization_config": UNIFIED},
        FOR_COMFYUI,
        nvfp4(Q),
        "ModelOpt's export for ComfyUI",
        "may be swizzled into cuBLAS tiles: export it without enable_swizzle_layout",
    ),
    "ModelOpt, surely swizzled": (
        {"quantization_config": UNIFIED},
        FOR_COMFYUI | {"_quantization_metadata": LAYERS},
        nvfp4(Q) | nvfp4("proj_out", 16, weight_scale=Tensor("F8_E4M3", (128, 8))),
        "ModelOpt's export for ComfyUI",
        "are swizzled",
    ),
    "BFL's names": ({}, {}, nvfp4(QKV), "BFL's or ComfyUI's single files", "either order"),
    "a prefix": (
        {},
        {},
        nvfp4(f"model.diffusion_model.{Q}"),
        "BFL's or ComfyUI's single files",
        "model.diffusion_model",
    ),
    "a single file in 16 bit": ({}, {}, {f"{QKV}.weight": PLAIN[f"{Q}.weight"]}, "a 16-bit single file", QKV),
    "scaled FP8, its marker": (
        {},
        {},
        fp8(QKV) | {"scaled_fp8": Tensor("F8_E4M3", (0,))},
        "ComfyUI's scaled FP8",
        "tensor scaled_fp8",
    ),
    "scaled FP8, its scales": ({}, {}, fp8(QKV, scale_weight=NUMBER), "ComfyUI's scaled FP8", f"{QKV}.scale_weight"),
    "FP8 in E5M2": ({}, {}, fp8(Q, "F8_E5M2"), "FP8 in E5M2", f"{Q}.weight is F8_E5M2"),
    "a cast to FP8": ({}, {}, {f"{Q}.weight": Tensor("F8_E4M3", (256, 128))}, "weights cast to FP8", "no weight_scale"),
    "FP8 in blocks": (
        {},
        {},
        {f"{Q}.weight": Tensor("F8_E4M3", (256, 128)), f"{Q}.weight_scale_inv": Tensor("F32", (2, 1))},
        "FP8 in blocks",
        "weight_scale_inv",
    ),
    "MXFP8": ({}, {}, fp8(Q, weight_scale=Tensor("F8_E8M0", (256, 4))), "MXFP8", "weight_scale F8_E8M0[256, 4]"),
    "MXFP4": ({}, {}, nvfp4(Q, weight_scale=Tensor("U8", (256, 4))), "MXFP4", "weight_scale U8[256, 4]"),
    "INT8": ({}, {}, fp8(Q, "I8"), "INT8", "I8"),
    "LightX2V": ({}, {}, nvfp4(Q, weight_global_scale=NUMBER), "LightX2V", "reciprocals (2688/amax)"),
    "LightX2V, its inputs": ({}, {}, nvfp4(Q, input_absmax=NUMBER), "LightX2V", "input_absmax"),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {},
        PACKED | {f"{Q}.weight_global_scale": NUMBER},
        "compressed-tensors (llm-compressor)",
        f"{Q}.weight_packed",
    ),
    "torchao": ({}, {}, nvfp4(Q, torchao_nvfp4=VECTOR), "torchao's NVFP4", f"{Q}.torchao_nvfp4"),
    "nunchaku": ({}, {"quantization_config": '{"method": "svdquant"}'}, NUNCHAKU, "nunchaku's SVDQuant", "wscales"),
    "nunchaku, by its header": (
        {},
        {"quantization_config": '{"method": "svdquant"}'},
        PLAIN,
        "nunchaku's SVDQuant",
        "header",
    ),
    "nunchaku_lite": (
        {"quantization_config": {"quant_method": "nunchaku_lite", "svdq_w4a4": {"precision": "nvfp4"}}},
        {},
        PLAIN,
        "nunchaku's SVDQuant (diffusers' nunchaku_lite)",
        "quant_method nunchaku_lite in config.json",
    ),
    "bitsandbytes": ({}, {}, {f"{Q}.weight.absmax": NUMBER}, "bitsandbytes", "absmax"),
    "an unknown quantizer": ({"quantization_config": {"quant_method": "sdnq"}}, {}, nvfp4(Q), "sdnq", "config.json"),
    "another algorithm of ModelOpt": (
        {"quantization_config": UNIFIED | {"quant_algo": "W4A16_NVFP4"}},
        {},
        nvfp4(Q),
        "ModelOpt's W4A16_NVFP4",
        "fp4trt reads NVFP4,",
    ),
    "ModelOpt's own state": ({}, {}, nvfp4(f"{Q}.weight_quantizer._scale"), "ModelOpt's own state", "export_hf"),
    "nibbles swapped for SGLang": (
        {"quantization_config": UNIFIED | {"swap_weight_nibbles": True}},
        {},
        nvfp4(Q),
        "described for SGLang",
        "swap_weight_nibbles True",
    ),
}


@pytest.mark.parametrize("case", FOREIGN, ids=str)
def test_a_foreign_layout_is_refused_by_its_name_and_evidence(case: str) -> None:
    config, metadata, tensors, name, words = FOREIGN[case]
    with pytest.raises(BadCheckpoint) as refused:
        refuse_foreign_layout("theirs", config, metadata, tensors)
    message = str(refused.value)
    assert message.startswith(
        f"theirs is in the layout of {name}" if "SGLang" not in name else "theirs is in the layout"
    )
    assert words in message
    assert "\n" not in message
    assert not recognised(config, metadata, tensors).is_read


READ = {
    "fp4trt's own": ({"quantization_config": UNIFIED}, {"format": "pt"}, nvfp4(Q) | fp8("norm.linear")),
    "ModelOpt's, sizes that swizzling would pad": (
        {"quantization_config": UNIFIED},
        FOR_COMFYUI | {"_quantization_metadata": LAYERS},
        nvfp4(Q) | nvfp4("proj_out", 16),
    ),
    "one without a description": ({}, {}, nvfp4(Q)),
    "one with a described group size": ({"quantization_config": {"quant_algo": "NVFP4_SVD"}}, {}, nvfp4(Q)),
}


@pytest.mark.parametrize("case", READ, ids=str)
def test_a_unified_export_is_read_in_row_major_order_and_low_nibbles_first(case: str) -> None:
    layout = recognised(*READ[case])
    assert layout.is_read
    assert (layout.name, layout.block_scales) == ("ModelOpt's unified export", "row-major")
    assert (layout.nibbles, layout.global_scale) == ("low first", "multiplier")
    refuse_foreign_layout("ours", *READ[case])


def test_a_plain_checkpoint_is_no_foreign_layout() -> None:
    assert (
        recognised({"_class_name": "FluxTransformer2DModel"}, {"format": "pt"}, PLAIN).name == "a checkpoint in 16 bit"
    )


@pytest.mark.parametrize("described", [None, [], "modelopt", {"producer": "modelopt"}, {"quant_method": None}, 3])
def test_a_description_of_another_kind_than_expected_is_no_error(described: object) -> None:
    metadata = {"quantization_config": json.dumps(described)[:-1], "config": "{"}
    assert recognised({"quantization_config": described}, metadata, nvfp4(Q)).is_read


def write(path: Path, header: dict[str, object]) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def test_the_metadata_of_every_shard_is_merged(tmp_path: Path) -> None:
    for name, metadata in (("a", {"format": "pt"}), ("b", {"quantization_config": "{}"})):
        write(tmp_path / f"{name}.safetensors", {"__metadata__": metadata})
    shards = {"x": "a.safetensors", "y": "b.safetensors"}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert metadata_in_folder(tmp_path) == {"format": "pt", "quantization_config": "{}"}
    assert metadata_in_file(write(tmp_path / "none.safetensors", {})) == {}


def test_metadata_that_are_no_strings_are_a_damaged_header(tmp_path: Path) -> None:
    with pytest.raises(UnknownArtifact, match=r"damaged safetensors header .*format"):
        metadata_in_file(write(tmp_path / "a.safetensors", {"__metadata__": {"format": 1}}))


def test_a_gguf_file_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "flux.safetensors").write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
    with pytest.raises(UnknownArtifact, match="is a GGUF file"):
        tensors_in_file(tmp_path / "flux.safetensors")
