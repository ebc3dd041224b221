"""How the tensors of a quantized checkpoint are laid out, as far as names, shapes and metadata say.

NVFP4 files of several producers share tensor names, dtypes and shapes, and mean other numbers by them: block scales in
row-major order or in the tiles of cuBLAS, the first of two codes in the low or the high nibble, a global scale that
multiplies or divides. Nothing here reads a weight: only what its writer left beside the weights is evidence, and what
leaves two readings open is refused. :mod:`onnx_functions.layouts.detection` proves a reading against the 16-bit source.
Sources: the producers' own code, see docs/interchange.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from fp4trt.errors import BadCheckpoint
from fp4trt.number_formats import FORMATS

__all__ = [
    "MODELOPT_ALGORITHMS",
    "PREFIXES",
    "PROVENANCE",
    "HasDtypeAndShape",
    "Layout",
    "recognised",
    "refuse_foreign_layout",
    "swizzled_shape",
    "swizzled_shapes",
]

PREFIXES: Final = ("model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "model.")
"""What single files put before the names of a transformer's tensors."""

_MODELOPT: Final = "ModelOpt's unified export"
_ROW_MAJOR, _TILES, _UNKNOWN, _NONE = "row-major", "cuBLAS 128x4 tiles", "unknown", "none"
_LOW, _HIGH = "low first", "high first"
_MULTIPLIER, _RECIPROCAL = "multiplier", "reciprocal"
_QUANTIZE_HERE: Final = "quantize the 16-bit checkpoint with fp4trt, or export it with ModelOpt's export_hf_checkpoint"
_CONVERT: Final = "convert it first: fp4trt convert CHECKPOINT --to modelopt"
_COMFYUI, _BFL, _UNIFIED = "comfyui", "bfl", "modelopt"
"""What ``fp4trt convert`` calls the layouts."""
PROVENANCE: Final = "fp4trt"
"""Key of the header's metadata under which ``fp4trt convert`` says, as JSON, what it wrote; its ``layout`` in it."""
_ORIGINAL_NAMES: Final = ("double_blocks.", "single_blocks.")

_ALGORITHMS: Final = tuple(str(kind.modelopt["algorithm"]) for kind in FORMATS.values())

MODELOPT_ALGORITHMS: Final = (_ALGORITHMS[0], "NVFP4_AWQ", "NVFP4_SVD", *_ALGORITHMS[1:], "MIXED_PRECISION")
"""What fp4trt writes as `quant_algo`, and reads."""

_METHODS: Final[Mapping[str, str]] = {
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "nunchaku_lite": "nunchaku's SVDQuant (diffusers' nunchaku_lite)",
    "svdquant": "nunchaku's SVDQuant",
    "torchao": "torchao",
    "bfl": "diffusers' BFL layout",
    "gguf": "GGUF",
    "bitsandbytes": "bitsandbytes",
    "quanto": "optimum-quanto",
}


class HasDtypeAndShape(Protocol):
    """A tensor of a safetensors header: its dtype by the name there, such as F8_E4M3."""

    @property
    def dtype(self) -> str:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


Tensors = Mapping[str, HasDtypeAndShape]


@dataclass(frozen=True)
class Layout:
    """How a checkpoint lays out its quantized linears.

    Attributes:
        name: the layout, by its producer.
        is_read: whether fp4trt reads it.
        block_scales: their order: `row-major`, `cuBLAS 128x4 tiles`, `MMA lane order`, `transposed`, `unknown`, `none`.
        nibbles: which of two codes a byte holds first: `low first`, `high first`, `unknown`, `none`.
        global_scale: `multiplier` (amax/2688), `reciprocal` (2688/amax), `unknown`, `none`.
        evidence: what says so, in words.
        what_to_do: how to come by a checkpoint that is read; "" for one that is.
        convertible: what ``fp4trt convert`` calls the layout; "" where it does not take it, or has to be told.
        choices: what it may be where the user has to say so (``--from``).
    """

    name: str
    is_read: bool
    block_scales: str
    nibbles: str
    global_scale: str
    evidence: str
    what_to_do: str = ""
    convertible: str = ""
    choices: tuple[str, ...] = ()


def recognised(config: Mapping[str, Any], metadata: Mapping[str, str], tensors: Tensors) -> Layout:
    """Return the layout of a checkpoint, by the first piece of evidence that settles it.

    Args:
        config: of config.json; empty where there is none.
        metadata: the `__metadata__` of its safetensors headers, merged.
        tensors: name to what the headers say of each tensor.
    """
    for witness in _WITNESSES:
        if (layout := witness(config, metadata, tensors)) is not None:
            return layout
    raise AssertionError("the last witness knows every checkpoint")


def refuse_foreign_layout(where: str, config: Mapping[str, Any], metadata: Mapping[str, str], tensors: Tensors) -> None:
    """Refuse a checkpoint whose tensors mean something else than fp4trt would read.

    Args:
        where: the checkpoint's path, as the message names it.
        config, metadata, tensors: as :func:`recognised` takes them.

    Raises:
        BadCheckpoint: naming the layout, what says so, and what to do.
    """
    layout = recognised(config, metadata, tensors)
    if not layout.is_read:
        raise BadCheckpoint(f"{where} is in the layout of {layout.name} ({layout.evidence}); {layout.what_to_do}")


def swizzled_shape(rows: int, blocks: int) -> tuple[int, int]:
    """Return the shape that block scales [rows, blocks] have in the 128x4 tiles of cuBLAS, padded."""
    return -(-rows // 128) * 128, -(-blocks // 4) * 4


def swizzled_shapes(rows: int, blocks: int) -> tuple[tuple[int, ...], ...]:
    """Return all shapes under which the tiles are stored: as a padded matrix, flat, or as torchao has them."""
    high, wide = swizzled_shape(rows, blocks)
    return (high, wide), (high * wide,), (high // 4, wide * 4)


def _nunchaku(_config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    for name in tensors:
        stem = name.removesuffix(".qweight")
        beside = [leaf for leaf in ("wscales", "proj_down", "lora_down") if f"{stem}.{leaf}" in tensors]
        if stem != name and beside:
            evidence = f"the tensor {name} with {beside[0]}"
            todo = f"its kernels' packing is not read: {_QUANTIZE_HERE} (recipe svdquant-r32)"
            return _foreign("nunchaku's SVDQuant", evidence, todo, "MMA lane order", _LOW, _MULTIPLIER)
    return None


def _modelopt_for_comfyui(_config: Mapping[str, Any], metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    """Know the exports that ModelOpt makes for ComfyUI.

    ModelOpt 0.47 writes `quantization_config` into the header with any of `enable_swizzle_layout`, `padding_strategy`,
    `enable_layerwise_quant_metadata` and `merged_base_safetensor_path`, and never without; which of them it was, only
    the shapes can tell (`_postprocess_safetensors` in `modelopt/torch/export/unified_export_hf.py`).
    """
    if not _by_modelopt(metadata) or not _quantized(tensors):
        return None
    order, witness = _order_by_shape(tensors)
    if order == _ROW_MAJOR:  # swizzling pads every linear of a file
        return None
    certain = order == _TILES
    return _foreign(
        "ModelOpt's export for ComfyUI",
        f"quantization_config in the safetensors header{'; ' + witness if certain else ''}",
        f"its block scales {'are' if certain else 'may be'} swizzled into cuBLAS tiles: export it without "
        "enable_swizzle_layout, padding_strategy and enable_layerwise_quant_metadata",
        order,
        _LOW,
        _MULTIPLIER,
        choices=() if certain else (_UNIFIED,),
    )


def _by_modelopt(metadata: Mapping[str, str]) -> bool:
    described = _object(metadata.get("quantization_config"))
    producer = described.get("producer")
    return "modelopt" in (described.get("quant_method"), producer.get("name") if isinstance(producer, dict) else None)


@dataclass(frozen=True)
class _Mark:
    """A tensor name that one producer alone writes: its last part, and what is known of that producer's layout."""

    leaf: str
    layout: str
    block_scales: str
    nibbles: str
    global_scale: str
    why: str


_RECIPROCALS: Final = "its global scales are reciprocals (2688/amax)"
_SCALED: Final = "its scales have other names"
_HIGH_AND_TILED: Final = "high nibbles first and block scales in cuBLAS tiles are not read as they are"
_COMPRESSED: Final = "compressed-tensors (llm-compressor)"
_NF4: Final = "its blocks and codes are others"
_MARKS: Final = (
    _Mark("comfy_quant", "ComfyUI", _TILES, _HIGH, _MULTIPLIER, _HIGH_AND_TILED),
    _Mark("scaled_fp8", "ComfyUI's scaled FP8", _NONE, _NONE, _MULTIPLIER, _SCALED),
    _Mark("scale_weight", "ComfyUI's scaled FP8", _NONE, _NONE, _MULTIPLIER, _SCALED),
    _Mark("weight_packed", _COMPRESSED, _ROW_MAJOR, _LOW, _RECIPROCAL, _RECIPROCALS),
    _Mark("weight_global_scale", "LightX2V", _UNKNOWN, _UNKNOWN, _RECIPROCAL, _RECIPROCALS),
    _Mark("input_global_scale", "LightX2V", _UNKNOWN, _UNKNOWN, _RECIPROCAL, _RECIPROCALS),
    _Mark("input_absmax", "LightX2V", _UNKNOWN, _UNKNOWN, _RECIPROCAL, _RECIPROCALS),
    _Mark("torchao_nvfp4", "torchao's NVFP4", _UNKNOWN, _LOW, _MULTIPLIER, "that tensor alone says in which order"),
    _Mark("weight.absmax", "bitsandbytes", _NONE, _HIGH, _NONE, _NF4),
    _Mark("SCB", "bitsandbytes", _NONE, _NONE, _NONE, _NF4),
)


def _marked(_config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    for mark in _MARKS:
        name = next((name for name in tensors if f".{name}".endswith(f".{mark.leaf}")), None)
        if name is not None:
            if mark.leaf == "comfy_quant":
                return _comfy(f"the tensor {name}", tensors)
            todo = f"{mark.why}: {_QUANTIZE_HERE}"
            kind = mark.block_scales, mark.nibbles, mark.global_scale
            return Layout(mark.layout, False, *kind, f"the tensor {name}", todo)
    return None


def _comfyui_metadata(_config: Mapping[str, Any], metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    proven = _by_modelopt(metadata) and _order_by_shape(tensors)[0] == _ROW_MAJOR
    if proven or "_quantization_metadata" not in metadata:
        return None
    return _comfy("_quantization_metadata in the safetensors header", tensors)


def _comfy(evidence: str, tensors: Tensors) -> Layout:
    if any(tensors[f"{path}.weight"].dtype == "U8" for path in _with_scales(tensors)):
        kind = _TILES, _HIGH, _MULTIPLIER
        return _foreign("ComfyUI", evidence, f"{_HIGH_AND_TILED}: {_CONVERT}", *kind, _COMFYUI)
    todo = f"FP8 and INT8 under its marks are not read as they are: {_CONVERT}"
    return _foreign("ComfyUI", evidence, todo, _NONE, _NONE, convertible=_COMFYUI)


def _foreign(
    name: str,
    evidence: str,
    what_to_do: str = f"it is not read: {_QUANTIZE_HERE}",
    block_scales: str = _UNKNOWN,
    nibbles: str = _UNKNOWN,
    global_scale: str = _UNKNOWN,
    convertible: str = "",
    choices: tuple[str, ...] = (),
) -> Layout:
    return Layout(name, False, block_scales, nibbles, global_scale, evidence, what_to_do, convertible, choices)


def _modelopt_state(_config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    quantizers = ("weight_quantizer", "input_quantizer", "output_quantizer")
    name = next((name for name in tensors if any(f".{quantizer}._" in name for quantizer in quantizers)), None)
    if name is None:
        return None
    todo = "export the model with ModelOpt's export_hf_checkpoint"
    return _foreign("ModelOpt's own state (mto.save)", f"the tensor {name}", todo)


def _declared_elsewhere(config: Mapping[str, Any], metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    """Know a checkpoint by the quantizer that its config.json, or its header, names."""
    places = {"config.json": config.get("quantization_config"), "the safetensors header": None}
    places["the safetensors header"] = _object(metadata.get("quantization_config")) or None
    for place, described in places.items():
        if not isinstance(described, Mapping):
            continue
        method = described.get("quant_method", described.get("method"))
        if method not in (None, "modelopt"):
            name = _METHODS.get(str(method), str(method))
            evidence = f"quant_method {method} in {place}"
            return _foreign(name, evidence)
        algo = described.get("quant_algo")
        if algo is not None and algo not in MODELOPT_ALGORITHMS and _quantized(tensors):
            name, evidence = f"ModelOpt's {algo}", f"quant_algo in {place}"
            todo = f"fp4trt reads {', '.join(MODELOPT_ALGORITHMS)}: quantize with one of these"
            return _foreign(name, evidence, todo)
    return None


def _sglang(config: Mapping[str, Any], _metadata: Mapping[str, str], _tensors: Tensors) -> Layout | None:
    """Know the keys by which SGLang is told of another layout."""
    described = config.get("quantization_config")
    if not isinstance(described, Mapping):
        return None
    usual = {
        "swap_weight_nibbles": (None, False),
        "checkpoint_uses_comfy_quantization": (None, False),
        "checkpoint_uses_packed_qkv": (None, False),
        "checkpoint_weight_scale_layout": (None, "linear"),
    }
    key = next((key for key, values in usual.items() if described.get(key) not in values), None)
    if key is None:
        return None
    evidence = f"{key} {described[key]!r} in config.json"
    return _foreign("BFL's or ComfyUI's checkpoints, described for SGLang", evidence)


def _by_shape(_config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    """Know other number formats, block scales that are bytes, and ones that are padded to tiles."""
    for path in _with_scales(tensors):
        weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
        if (name := _other_format(weight, scales)) is not None:
            evidence = f"{path}.weight is {weight.dtype}, its weight_scale {scales.dtype}{list(scales.shape)}"
            return _foreign(name, evidence)
        if weight.dtype == scales.dtype == "U8":
            evidence = f"{path}.weight_scale is {scales.dtype}{list(scales.shape)}: block scales as bytes"
            return _comfy(evidence, tensors)
    order, witness = _order_by_shape(tensors)
    if order != _TILES:
        return None
    todo = (
        f"block scales in cuBLAS tiles are not read: {_QUANTIZE_HERE}, without enable_swizzle_layout; or, of a file of "
        "ComfyUI's, fp4trt convert CHECKPOINT --from comfyui --to modelopt"
    )
    name = "tiled block scales (ComfyUI's, torchao's, or ModelOpt's for ComfyUI)"
    return _foreign(name, witness, todo, order, global_scale=_MULTIPLIER, choices=(_COMFYUI,))


def _other_format(weight: HasDtypeAndShape, scales: HasDtypeAndShape) -> str | None:
    """Return the name of a format that is neither NVFP4 nor FP8 in E4M3, None for one of these."""
    if weight.dtype in ("F8_E5M2", "I8"):
        return {"F8_E5M2": "FP8 in E5M2", "I8": "INT8"}[weight.dtype]
    if weight.dtype.startswith("F8"):
        of_ours = any((kind.codes, kind.scales[0].dtype) == (weight.dtype, scales.dtype) for kind in FORMATS.values())
        return "MXFP8" if scales.dtype in ("U8", "F8_E8M0") and not of_ours else None
    if weight.dtype != "U8" or len(weight.shape) != 2:
        return None
    of_32 = weight.shape[0], weight.shape[1] // 16
    is_mx = scales.dtype == "U8" and scales.shape in (of_32, swizzled_shape(*of_32))
    return "MXFP4" if scales.dtype == "F8_E8M0" or is_mx else None


def _bare_fp8(_config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    """Know weights that were cast to FP8, or scaled in blocks, without any scale of a name that is read."""
    if _quantized(tensors):
        return None
    name = next(
        (name for name, each in tensors.items() if each.dtype.startswith("F8_") and name.endswith(".weight")), ""
    )
    if not name:
        return None
    scales = f"{name}_scale_inv"
    blocks = scales in tensors
    evidence = f"the tensor {scales}" if blocks else f"{name} is {tensors[name].dtype}, with no weight_scale anywhere"
    title = "FP8 in blocks (DeepSeek's)" if blocks else "weights cast to FP8"
    return _foreign(title, evidence, block_scales=_NONE, nibbles=_NONE)


def _original_names(config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    """Know a single file by the names of its tensors: those of the model's own repository, or prefixed ones."""
    prefix = _prefix(tensors)
    if prefix == "model." and "architectures" in config and "_class_name" not in config:
        return None  # transformers' own names
    name = next((name for name in tensors if name.removeprefix(prefix).startswith(_ORIGINAL_NAMES)), None)
    name = name or (next(name for name in tensors if name.startswith(prefix)) if prefix else None)
    if name is None:
        return None
    evidence = f"the tensor {name}"
    if not _quantized(tensors):
        todo = "give the file itself, which is read as a single file"
        return _foreign("a 16-bit single file", evidence, todo, _NONE, _NONE, _NONE)
    todo = (
        "expected diffusers' names; under these, block scales and nibbles have either order: fp4trt convert CHECKPOINT "
        "--to modelopt takes it once told which, by --from comfyui (tiles, high nibble first) or --from bfl"
    )
    name = "BFL's or ComfyUI's single files"
    return _foreign(name, evidence, todo, global_scale=_MULTIPLIER, choices=(_COMFYUI, _BFL))


def _written_by_convert(_config: Mapping[str, Any], metadata: Mapping[str, str], _tensors: Tensors) -> Layout | None:
    """Know a file that ``fp4trt convert`` wrote for diffusers under the names of the model's own repository."""
    if _object(metadata.get(PROVENANCE)).get("layout") != _BFL:
        return None
    evidence = f"{PROVENANCE} in the safetensors header"
    kind = _ROW_MAJOR, _LOW, _MULTIPLIER
    return _foreign("a single file for diffusers", evidence, f"its names are not read: {_CONVERT}", *kind, _BFL)


def _modelopt(config: Mapping[str, Any], _metadata: Mapping[str, str], tensors: Tensors) -> Layout | None:
    if not _quantized(tensors):
        return None
    described = config.get("quantization_config")
    declared = isinstance(described, Mapping) and described.get("quant_method") == "modelopt"
    evidence = "quant_method modelopt in config.json" if declared else "its tensors' names and shapes"
    return Layout(_MODELOPT, True, _ROW_MAJOR, _LOW, _MULTIPLIER, evidence, convertible=_UNIFIED)


def _plain(_config: Mapping[str, Any], _metadata: Mapping[str, str], _tensors: Tensors) -> Layout:
    return Layout("a checkpoint in 16 bit", True, _NONE, _NONE, _NONE, "no tensor with a scale")


_WITNESSES: Final[tuple[Callable[[Mapping[str, Any], Mapping[str, str], Tensors], Layout | None], ...]] = (
    _nunchaku,
    _marked,
    _modelopt_for_comfyui,
    _comfyui_metadata,
    _modelopt_state,
    _sglang,
    _declared_elsewhere,
    _by_shape,
    _bare_fp8,
    _written_by_convert,
    _original_names,
    _modelopt,
    _plain,
)
"""In order: a writer's own mark before what several writers share."""


def _object(text: str | None) -> Mapping[str, Any]:
    """Return the JSON object that a header's metadata holds as a string, an empty one for anything else."""
    try:
        value = json.loads(text or "")
    except (ValueError, TypeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _prefix(tensors: Tensors) -> str:
    """Return the prefix of a single file's names, "" without one."""
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            return prefix
    return ""


def _quantized(tensors: Tensors) -> bool:
    return any(name.endswith(".weight_scale") for name in tensors)


def _with_scales(tensors: Tensors) -> Iterator[str]:
    """Yield the linears with a weight_scale beside their weight."""
    for name in tensors:
        path = name.removesuffix(".weight_scale")
        if path != name and f"{path}.weight" in tensors:
            yield path


def _order_by_shape(tensors: Tensors) -> tuple[str, str]:
    """Return the order of NVFP4 block scales where some shape gives it away, with the tensor that does."""
    for path in _with_scales(tensors):
        weight, scales = tensors[f"{path}.weight"], tensors[f"{path}.weight_scale"]
        if weight.dtype != "U8" or len(weight.shape) != 2 or weight.shape[1] < 8:
            continue
        rows, blocks = weight.shape[0], weight.shape[1] * 2 // 16
        tiles = swizzled_shapes(rows, blocks)
        found = f"{path}.weight_scale is {scales.dtype}{list(scales.shape)} for weights [{rows}, {weight.shape[1] * 2}]"
        if scales.shape != (rows, blocks) and scales.shape in tiles:
            return _TILES, f"{found}: padded to tiles"
        if scales.shape == (rows, blocks) != tiles[0]:
            return _ROW_MAJOR, f"{found}: not padded to tiles"
    return _UNKNOWN, ""
