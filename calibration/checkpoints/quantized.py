"""Quantized checkpoints: read what a folder holds, load it back into torch.

A folder in ModelOpt's unified layout; what each of its tensors means is in :mod:`fp4trt.account`, which refuses by name
what means nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from calibration.checkpoints.plain import model_class, stays_fp32, wide_tensors
from calibration.formats import fp8, fp8_attention
from calibration.formats.arithmetic import arithmetic_of
from calibration.formats.linears import QuantizedLinear
from fp4trt.account import BRANCH, OUTPUT_SCALE, SCALE_LEAVES, SMOOTHING, Account, account_of, is_quantized_checkpoint
from fp4trt.checkpoint_folder import metadata_in_folder, tensors_in_folder
from fp4trt.checkpoint_manifest import MANIFEST, load_manifest
from fp4trt.errors import BadCheckpoint
from fp4trt.families import Family, family_of
from fp4trt.json_file import load_json
from fp4trt.number_formats import FORMATS, FP8, NVFP4
from fp4trt.options import takes
from fp4trt.pipeline_folder import transformer_folder
from fp4trt.progress import PATIENCE_S, Progress, tracking
from fp4trt.safetensors_file import StoredTensor, hold
from fp4trt.verb import verb

__all__ = [
    "BRANCH",
    "FP8_SCALES",
    "SCALES",
    "SMOOTHING",
    "WEIGHTS",
    "Checkpoint",
    "empty_model",
    "load",
    "plain_config",
    "read",
    "reader",
]

WEIGHTS: Final = "diffusion_pytorch_model.safetensors"
SCALES: Final = NVFP4.leaves
"""What a linear in NVFP4 has beside its weight (and bias)."""
FP8_SCALES: Final = FP8.leaves
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
    """A checkpoint on disk: its description, and where each tensor lies.

    Attributes:
        directory: where.
        config: its config.json.
        manifest: its fp4trt.json, empty without one.
        tensors: under the names of :mod:`fp4trt.account`, with scales in place of ModelOpt's amax of attention.
        account: what each of them means; None of a plain checkpoint.
    """

    directory: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    account: Account | None = None

    @cached_property
    def family(self) -> Family:
        """The model family of the config."""
        return family_of(self.config)

    @cached_property
    def formats(self) -> dict[str, str]:
        """Module path of every quantized linear to its format: NVFP4 first, and then in graph order."""
        return {path: name for name in FORMATS for path in self.of_format(name)}

    def of_format(self, name: str) -> tuple[str, ...]:
        """Return the module paths of the linears that are stored in a format, those of the family first."""
        return self.account.of_format(name) if self.account else ()

    @cached_property
    def quantized(self) -> tuple[str, ...]:
        """Module paths of the linears that are stored in NVFP4, those of the family first, in graph order."""
        return self.of_format(NVFP4.name)

    @cached_property
    def fp8(self) -> tuple[str, ...]:
        """Module paths of the linears that are stored in FP8, likewise."""
        return self.of_format(FP8.name)

    @property
    def branched(self) -> tuple[str, ...]:
        """Module paths of the linears with a low-rank branch or a scaled input, whatever their weight is stored in."""
        return self.account.altered if self.account else ()

    @property
    def is_quantized(self) -> bool:
        """Whether any linear is quantized."""
        return bool(self.formats)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears in NVFP4 by shared input."""
        return self.groups_of(self.quantized)

    def groups_of(self, paths: Collection[str]) -> tuple[tuple[str, ...], ...]:
        """Return some of the linears by shared input; one that the family does not quantize is alone."""
        return self.family.groups_of(self.config, paths)

    @cached_property
    def fp8_attentions(self) -> tuple[str, ...]:
        """Module paths of the attentions whose products are in FP8, in graph order."""
        return tuple(self.account.attentions) if self.account else ()

    def rounds_output(self, attention: str) -> bool:
        """Whether what an attention's second product gives is rounded to FP8 too."""
        return f"{attention}.{OUTPUT_SCALE}" in self.tensors

    def rank(self, path: str) -> int:
        """Return the rank of a linear's low-rank branch, 0 without one."""
        return self.account.linears[path].rank if self.account and path in self.account.linears else 0

    @cached_property
    def wide(self) -> frozenset[str]:
        """Names of the tensors that hold more than BF16 does, and that the model computes with in FP32."""
        others = {name: t for name, t in self.tensors.items() if t.dtype in ("F16", "F32") and not _is_scale(name)}
        if not others:
            return frozenset()
        with torch.device("meta"):
            model: nn.Module = model_class(self.family).from_config(plain_config(self.config))
        return wide_tensors(model, others)

    def is_smoothed(self, path: str) -> bool:
        """Whether the input of a linear is scaled by channel first."""
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
        kind = FORMATS[self.formats[path]]
        leaves = ("weight", *(scale.leaf for scale in kind.scales if not scale.of_input))
        try:
            value = arithmetic_of(kind.name).restored({leaf: self.tensor(f"{path}.{leaf}") for leaf in leaves})
        except ValueError as error:
            raise BadCheckpoint(f"{self.directory}: {path}.{error}: quantize again") from None
        return value.to(dtype)


def read(directory: str | Path) -> Checkpoint:
    """Read a quantized checkpoint's description, accounting for every tensor; of the weights nothing is read.

    Raises:
        BadCheckpoint: something is missing, damaged or contradictory, or there is a tensor of no meaning here.
        UnknownFamily: the model is of no family of ours.
    """
    folder = transformer_folder(Path(directory))
    config = load_json(folder / "config.json")
    manifest = load_manifest(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    tensors = tensors_in_folder(folder)
    if not is_quantized_checkpoint(config, tensors):
        raise _not_quantized(folder)
    metadata = metadata_in_folder(folder)
    account = account_of(str(folder), config, metadata, tensors, lambda name: _scalar(tensors[name]), manifest)
    checkpoint = Checkpoint(folder, config, manifest, _normal(account, tensors), account)
    if not checkpoint.is_quantized:
        raise _not_quantized(folder)
    return checkpoint


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in SCALE_LEAVES


def _not_quantized(folder: Path) -> BadCheckpoint:
    return BadCheckpoint(f"{folder} holds no NVFP4 weights; expected a quantized checkpoint: run fp4trt quantize first")


def _scalar(stored: StoredTensor) -> float:
    return float(stored.tensor().reshape(()))


def _normal(account: Account, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors with scales of no axis, and with those of attention in place of ModelOpt's amax."""
    made = {name: f"{path}.{scale}" for path, scales in account.attentions.items() for scale, name in scales.items()}
    normal: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        if made.get(name, name) != name:
            normal[made[name]] = hold(made[name], fp8.tensor_scale(_scalar(stored)))
        else:
            is_scale = stored.dtype == "F32" and stored.shape == (1,) and name not in account.family_state
            normal[name] = replace(stored, shape=()) if is_scale else stored
    return normal


def _floating(value: Any) -> str | None:
    return None if isinstance(value, torch.dtype) and value.is_floating_point else "torch.bfloat16 or torch.float32"


@verb
@takes(dtype=_floating)
def load(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize_activations: bool = True,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> nn.Module:
    """Load a quantized checkpoint as its diffusers class, in eval mode, on the CPU.

    Every linear that is quantized, has a branch or a scaled input becomes a
    :class:`calibration.formats.linears.QuantizedLinear`, and attentions in FP8 compute as
    :class:`calibration.formats.fp8_attention.FP8Attention`; in BF16 the model computes what fake quantization computes,
    bit for bit.

    Args:
        directory: the checkpoint.
        dtype: of weights and computation; scales stay FP32.
        quantize_activations: False leaves the linears' inputs and the attentions unquantized.
        progress: called with each step; there is one a tensor.

    Raises:
        BadOption: the dtype is no floating-point one.
        BadCheckpoint: the folder is not what :func:`read` accepts, or its tensors do not fit its config.
    """
    checkpoint = read(directory)
    model = empty_model(checkpoint, quantize_activations)
    value = reader(checkpoint, model, dtype)
    state, names = {}, list(model.state_dict())
    with tracking(len(names), "loading", PATIENCE_S) as advance:
        for name in names:
            state[name] = value(name)
            advance()
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def empty_model(checkpoint: Checkpoint, quantize_activations: bool = True) -> nn.Module:
    """Return the model that :func:`load` returns, on the meta device."""
    with torch.device("meta"):
        model = model_class(checkpoint.family).from_config(plain_config(checkpoint.config))
        for path in dict.fromkeys((*checkpoint.formats, *checkpoint.branched)):
            replacement = _linear_like(checkpoint, path, model.get_submodule(path))
            replacement.quantize_activations = quantize_activations
            model.set_submodule(path, replacement)
        for path in checkpoint.fp8_attentions if quantize_activations else ():
            fp8_attention.quantize_attention(model.get_submodule(path), checkpoint.rounds_output(path))
    return model


def _linear_like(checkpoint: Checkpoint, path: str, linear: Any) -> QuantizedLinear:
    """Return the module, on the meta device, that computes as a linear of the checkpoint."""
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    kind, rank, smoothing = checkpoint.formats.get(path), checkpoint.rank(path), checkpoint.is_smoothed(path)
    return QuantizedLinear(*sizes, kind, rank, smoothing)


def reader(checkpoint: Checkpoint, model: nn.Module, dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    """Return what reads a tensor of the model's state, a quantized weight dequantized, rounded to ``dtype``.

    One that diffusers keeps in FP32 is not rounded, and held in FP32.

    It raises BadCheckpoint for a tensor that is missing or of another shape than the model's.
    """
    shapes = {name: value.shape for name, value in model.state_dict().items()}

    def value_of(name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        if path in checkpoint.formats and leaf == "weight":
            value = checkpoint.weight(path, dtype)
        elif leaf in ("input_scale", *fp8_attention.SCALES, OUTPUT_SCALE):
            value = checkpoint.tensor(name)
        else:
            stored = checkpoint.tensor(name)
            value = stored.float() if stays_fp32(model, name) else stored.to(dtype)
        if not value.isfinite().all():
            raise BadCheckpoint(
                f"{name} in {checkpoint.directory} holds values that are no finite {_name_of(dtype)} numbers; quantize "
                "again"
            )
        if value.shape != shapes[name]:
            raise BadCheckpoint(
                f"{name} is {list(value.shape)} in {checkpoint.directory}, {list(shapes[name])} by its config.json"
            )
        return value

    return value_of


def _name_of(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}.get(dtype, str(dtype))


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without the entry that would make diffusers look for a quantizer of its own."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
