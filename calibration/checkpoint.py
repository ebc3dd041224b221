"""Quantized checkpoints: read what a folder holds, load it back into torch.

A folder in ModelOpt's unified layout: for a quantized linear X, ``X.weight`` U8 [N, K/2] (two E2M1 codes a byte),
``X.weight_scale`` F8_E4M3 [N, K/16], ``X.weight_scale_2`` and ``X.input_scale`` F32 scalars (amax / (6 * 448)); for
one in FP8 ``X.weight`` F8_E4M3 [N, K], ``X.weight_scale`` and ``X.input_scale`` F32 scalars (amax / 448); for an
attention A in FP8 ``A.q_scale``, ``A.k_scale`` and ``A.v_scale``, likewise; and the rest as diffusers has it. Where
SVDQuant made an NVFP4 weight, its codes are of what the low-rank branch leaves; that is ``X.svdquant_lora_a`` [rank,
K], ``X.svdquant_lora_b`` [N, rank] and, with smoothing, ``X.pre_quant_scale`` [K].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from calibration import fp8, fp8_attention, nvfp4
from calibration.errors import BadCheckpoint
from calibration.fp8_linear import FP8Linear
from calibration.models import Family, family_of
from calibration.nvfp4_linear import NVFP4Linear
from calibration.safetensors_file import StoredTensor
from calibration.source import load_json, model_class, tensors_of, transformer_folder
from calibration.svdquant_linear import SVDQuantLinear

__all__ = [
    "BRANCH",
    "FP8_SCALES",
    "MANIFEST",
    "SCALES",
    "SMOOTHING",
    "WEIGHTS",
    "Checkpoint",
    "empty_model",
    "load",
    "load_manifest",
    "plain_config",
    "read",
    "reader",
]

WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
MANIFEST: Final = "fp4trt.json"
SCALES: Final = ("weight_scale", "weight_scale_2", "input_scale")
"""What a linear in NVFP4 has beside its weight (and bias)."""
BRANCH: Final = ("svdquant_lora_a", "svdquant_lora_b")
"""What one has besides where SVDQuant made it, [rank, K] and [N, rank]."""
SMOOTHING: Final = "pre_quant_scale"
"""What one has besides where its input is scaled by channel, [K]."""
FP8_SCALES: Final = ("weight_scale", "input_scale")
"""What a linear in FP8 has beside its weight (and bias)."""

_NUMPY: Final = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "U8": np.uint8,
}


@dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint on disk: its description, and where each tensor lies."""

    directory: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    tensors: Mapping[str, StoredTensor]

    @cached_property
    def family(self) -> Family:
        """The model family of the config."""
        return family_of(self.config)

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Module paths of the linears that are stored in NVFP4, in graph order."""
        found, in_fp8 = self.family.quantized(self.config), set(self.fp8)
        return tuple(path for path in found if f"{path}.weight_scale" in self.tensors and path not in in_fp8)

    @cached_property
    def fp8(self) -> tuple[str, ...]:
        """Module paths of the linears that are stored in FP8, in graph order."""
        weights = {path: self.tensors.get(f"{path}.weight") for path in self.family.quantized(self.config)}
        return tuple(path for path, weight in weights.items() if weight is not None and weight.dtype == "F8_E4M3")

    @property
    def is_quantized(self) -> bool:
        """Whether any linear is stored in NVFP4 or FP8."""
        return bool(self.quantized or self.fp8)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears in NVFP4 by shared input."""
        return self.groups_of(self.quantized)

    def groups_of(self, paths: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """Return some of the linears by shared input."""
        found = set(paths)
        kept = (tuple(path for path in group if path in found) for group in self.family.groups(self.config))
        return tuple(group for group in kept if group)

    @cached_property
    def fp8_attentions(self) -> tuple[str, ...]:
        """Module paths of the attentions whose products are in FP8, in graph order."""
        paths = self.family.attentions(self.config)
        return tuple(path for path in paths if f"{path}.{fp8_attention.SCALES[0]}" in self.tensors)

    def rank(self, path: str) -> int:
        """Return the rank of a quantized linear's low-rank branch, 0 without one."""
        factor = self.tensors.get(f"{path}.{BRANCH[0]}")
        return factor.shape[0] if factor is not None else 0

    def is_smoothed(self, path: str) -> bool:
        """Whether the input of a quantized linear is scaled by channel first."""
        return f"{path}.{SMOOTHING}" in self.tensors

    @property
    def recipe(self) -> str:
        """Name of the recipe, ``unknown`` for a checkpoint that another program wrote."""
        return str(self.manifest.get("recipe", {}).get("name", "unknown"))

    def raw(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as numpy (BF16 and E4M3 as ml_dtypes), read from disk.

        Raises:
            BadCheckpoint: there is none of that name.
        """
        stored = self._stored(name)
        return stored.bytes().view(_NUMPY[stored.dtype]).reshape(stored.shape)

    def _stored(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise BadCheckpoint(f"{self.directory} has no tensor {name}; is config.json the one of these weights?")
        return self.tensors[name]

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as torch has it, read from disk."""
        return self._stored(name).tensor()

    def weight(self, path: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dequantized weight [N, K] of a quantized linear: FP32 products, rounded once to ``dtype``."""
        if path in self.fp8:
            return fp8.dequantize(self.tensor(f"{path}.weight"), self.tensor(f"{path}.weight_scale")).to(dtype)
        codes = nvfp4.unpack_codes(self.tensor(f"{path}.weight"))
        scales = self.tensor(f"{path}.weight_scale")
        return nvfp4.dequantize(codes, scales, self.tensor(f"{path}.weight_scale_2")).to(dtype)


def load_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest, having checked the shape of what is read from it.

    Raises:
        BadCheckpoint: it is damaged.
    """
    manifest = load_json(path)
    for key in ("files", "quantized", "recipe", "attention"):
        if not isinstance(manifest.get(key, {}), dict):
            raise BadCheckpoint(
                f"{path}: {key} is a JSON {type(manifest[key]).__name__}, expected an object; quantize again"
            )
    for key in ("quantized", "attention"):
        for kind, paths in manifest.get(key, {}).items():
            if not isinstance(paths, list) or not all(isinstance(name, str) for name in paths):
                raise BadCheckpoint(f"{path}: {key}.{kind} is no list of module paths; quantize again")
    return manifest


def read(directory: str | Path) -> Checkpoint:
    """Read a quantized checkpoint's description, checking it against itself but reading no weights.

    Raises:
        BadCheckpoint: something is missing, damaged or contradictory.
        UnknownFamily: the model is of no family of ours.
    """
    folder = transformer_folder(Path(directory))
    config = load_json(folder / "config.json")
    manifest = load_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    checkpoint = Checkpoint(folder, config, manifest, tensors_of(folder))
    if not checkpoint.is_quantized:
        raise BadCheckpoint(
            f"{folder} holds no NVFP4 weights; expected a quantized checkpoint: run fp4trt quantize first"
        )
    branched = [path for path in checkpoint.quantized if checkpoint.rank(path)]
    for kind, name, found in (
        ("nvfp4", "NVFP4 weights", checkpoint.quantized),
        ("fp8", "FP8 weights", checkpoint.fp8),
        ("svdquant", "low-rank branch", branched),
    ):
        for path in manifest.get("quantized", {}).get(kind, []):
            if path not in found:
                raise BadCheckpoint(f"{folder} has no {name} for {path}, which its {MANIFEST} promises; quantize again")
    for path in checkpoint.quantized:
        _check_linear(checkpoint, path)
        _check_branch(checkpoint, path)
    for path in checkpoint.fp8:
        _check_fp8_linear(checkpoint, path)
    for path in (*checkpoint.fp8_attentions, *manifest.get("attention", {}).get("fp8", [])):
        _check_attention(checkpoint, path)
    return checkpoint


def _check_linear(checkpoint: Checkpoint, path: str) -> None:
    for name in ("weight", *SCALES):
        if f"{path}.{name}" not in checkpoint.tensors:
            raise BadCheckpoint(
                f"{checkpoint.directory} lacks {path}.{name}; expected NVFP4 codes with all their scales"
            )
    codes, scales = checkpoint.tensors[f"{path}.weight"], checkpoint.tensors[f"{path}.weight_scale"]
    rows, packed = codes.shape
    if codes.dtype != "U8" or scales.dtype != "F8_E4M3" or scales.shape != (rows, packed * 2 // nvfp4.BLOCK_SIZE):
        raise BadCheckpoint(
            f"{path} has codes {codes.dtype}{list(codes.shape)} and block scales {scales.dtype}{list(scales.shape)}; "
            f"expected U8 [N, K/2] and F8_E4M3 [N, K/{nvfp4.BLOCK_SIZE}]"
        )


def _check_branch(checkpoint: Checkpoint, path: str) -> None:
    rows, packed = checkpoint.tensors[f"{path}.weight"].shape
    rank = checkpoint.rank(path)
    wanted = dict(zip(BRANCH, ((rank, packed * 2), (rows, rank)), strict=True)) | {SMOOTHING: (packed * 2,)}
    found = {kind: checkpoint.tensors[name] for kind in wanted if (name := f"{path}.{kind}") in checkpoint.tensors}
    for kind, tensor in found.items():
        if tensor.shape != wanted[kind] or tensor.dtype not in ("BF16", "F16", "F32"):
            raise BadCheckpoint(
                f"{path}.{kind} is {tensor.dtype}{list(tensor.shape)}; expected {list(wanted[kind])} in 16 bit"
            )
    if len(found.keys() & set(BRANCH)) == 1:
        raise BadCheckpoint(f"{checkpoint.directory} has half of the branch of {path}; expected {' and '.join(BRANCH)}")


def _check_fp8_linear(checkpoint: Checkpoint, path: str) -> None:
    for name in FP8_SCALES:
        scale = checkpoint.tensors.get(f"{path}.{name}")
        if scale is None:
            raise BadCheckpoint(
                f"{checkpoint.directory} lacks {path}.{name}; expected FP8 codes with both their scales"
            )
        if scale.dtype != "F32" or scale.shape != ():
            raise BadCheckpoint(
                f"{path}.{name} is {scale.dtype}{list(scale.shape)} in {checkpoint.directory}; expected one F32 for "
                "the whole tensor: FP8 per channel or in blocks is not supported, quantize again"
            )


def _check_attention(checkpoint: Checkpoint, path: str) -> None:
    for name in (f"{path}.{scale}" for scale in fp8_attention.SCALES):
        stored = checkpoint.tensors.get(name)
        if stored is None or stored.dtype != "F32" or stored.shape:
            found = f"{stored.dtype}{list(stored.shape)}" if stored else "nothing"
            raise BadCheckpoint(
                f"{checkpoint.directory} has {found} as {name}; expected an F32 scalar, as {path} is in FP8: "
                "quantize again"
            )


def load(directory: str | Path, dtype: torch.dtype = torch.bfloat16, quantize_activations: bool = True) -> nn.Module:
    """Load a quantized checkpoint as its diffusers class, in eval mode, on the CPU.

    Every quantized linear becomes an :class:`NVFP4Linear`, an :class:`SVDQuantLinear` or an :class:`FP8Linear`, and
    attentions in FP8 compute as :class:`calibration.fp8_attention.FP8Attention`; in BF16 the model computes what fake
    quantization computes, bit for bit.

    Args:
        directory: the checkpoint.
        dtype: of weights and computation; scales stay FP32.
        quantize_activations: False leaves the linears' inputs and the attentions unquantized.

    Raises:
        BadCheckpoint: the folder is not what :func:`read` accepts, or its tensors do not fit its config.
    """
    checkpoint = read(directory)
    model = empty_model(checkpoint, quantize_activations)
    value = reader(checkpoint, model, dtype)
    model.load_state_dict({name: value(name) for name in model.state_dict()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def empty_model(checkpoint: Checkpoint, quantize_activations: bool = True) -> nn.Module:
    """Return the model that :func:`load` returns, on the meta device."""
    with torch.device("meta"):
        model = model_class(checkpoint.family).from_config(plain_config(checkpoint.config))
        kinds: dict[str, type[NVFP4Linear | FP8Linear]] = dict.fromkeys(checkpoint.quantized, NVFP4Linear)
        for path, kind in {**kinds, **dict.fromkeys(checkpoint.fp8, FP8Linear)}.items():
            linear = model.get_submodule(path)
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            rank, smoothing = checkpoint.rank(path), checkpoint.is_smoothed(path)
            replacement = SVDQuantLinear(*sizes, rank, smoothing) if rank or smoothing else kind(*sizes)
            replacement.quantize_activations = quantize_activations
            model.set_submodule(path, replacement)
        for path in checkpoint.fp8_attentions if quantize_activations else ():
            fp8_attention.quantize_attention(model.get_submodule(path))
    return model


def reader(checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    """Return what reads a tensor of the model's state, a quantized weight dequantized, rounded to ``dtype``.

    It raises BadCheckpoint for a tensor that is missing or of another shape than the model's.
    """
    quantized = {*checkpoint.quantized, *checkpoint.fp8}
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def value_of(name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        if path in quantized and leaf == "weight":
            value = checkpoint.weight(path, dtype)
        elif leaf in ("input_scale", *fp8_attention.SCALES):
            value = checkpoint.tensor(name)
        else:
            value = checkpoint.tensor(name).to(dtype)
        if value.shape != shapes[name]:
            raise BadCheckpoint(
                f"{name} is {list(value.shape)} in {checkpoint.directory}, {list(shapes[name])} by its config.json"
            )
        return value

    return value_of


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without the entry that would make diffusers look for a quantizer of its own."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
