"""What a model computes that ModelOpt has quantized: formats, scales, smoothing and branches, as a checkpoint has them.

Every quantizer of the model is looked at. What a checkpoint cannot say is refused by name (``modelopt_quantizers.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from calibration.formats import fp8, fp8_attention
from calibration.methods.modelopt.fused_linears import Fused
from calibration.methods.modelopt.linears import nvfp4_tensors, quantizer_amax, rounded_tensors
from calibration.methods.plan import require_whole_blocks
from calibration.modelopt_states.quantizers import FORMATS, Unsayable, described, format_of, require_inert, smoothing_of
from fp4trt.account import BRANCH, OUTPUT_SCALE, SMOOTHING
from fp4trt.errors import BadAmax, BadCheckpoint
from fp4trt.families import Family
from fp4trt.number_formats import BF16, FP8, NVFP4

__all__ = ["ATTENTION_OPERANDS", "ATTENTION_OUTPUT", "Contents", "amax_of", "contents_of", "tensors_of"]

ATTENTION_OPERANDS: Final = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")
ATTENTION_OUTPUT: Final = "bmm2_output_quantizer"
_SOFTMAX: Final = "softmax_quantizer"

_LAYER_NORMS: Final = "for m in model.modules(): isinstance(m, torch.nn.LayerNorm) and m.input_quantizer.disable()"


@dataclass(frozen=True)
class Contents:
    """What a restored model computes.

    Attributes:
        formats: module path of every linear to its format, ``bf16`` without one, those of the family first.
        attentions: module path of each attention in FP8 to whether what it gives is rounded too.
    """

    formats: Mapping[str, str]
    attentions: Mapping[str, bool]


def contents_of(model: nn.Module, family: Family, config: Mapping[str, Any], state: str) -> Contents:
    """Return what a restored model computes.

    Args:
        model: restored.
        family: of the model.
        config: its config.
        state: what to call the file in a message.

    Raises:
        BadCheckpoint: some quantizer does what no checkpoint of ours can say; the first is named, with what it does.
        BadAmax: one was never calibrated.
    """
    linears, attentions = _linears_of(model), family.fp8_attentions(config)
    problems: list[tuple[str, Unsayable]] = []
    formats: dict[str, str] = {}
    in_fp8: dict[str, bool] = {}
    for path, module in model.named_modules():
        quantizers = {name: child for name, child in module.named_children() if name.endswith("_quantizer")}
        if not quantizers or path.endswith("_quantizer"):
            continue
        try:
            if path in linears:
                formats[path] = _linear_format(quantizers)
            elif path in attentions:
                rounded = _rounded_in_attention(quantizers)
                in_fp8 |= {path: ATTENTION_OUTPUT in rounded} if rounded else {}
            else:
                _require_all_inert(module, quantizers)
        except _At as problem:
            problems.append((f"{path}.{problem.leaf}", problem.problem))
    if problems:
        _refuse(problems, state)
    ordered = [path for path in family.quantized(config) if path in formats]
    ordered += [path for path in formats if path not in set(ordered)]
    kinds = {path: formats[path] for path in ordered} | {path: BF16 for path in linears if path not in formats}
    contents = Contents(kinds, {path: in_fp8[path] for path in attentions if path in in_fp8})
    _check_amax(model, contents, state)
    return contents


def _linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a model by their module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


class _At(Exception):
    """A problem, and the quantizer of a module that has it."""

    def __init__(self, leaf: str, problem: Unsayable) -> None:
        super().__init__(leaf)
        self.leaf, self.problem = leaf, problem


def _formats(quantizers: Mapping[str, nn.Module]) -> dict[str, str | None]:
    found = {}
    for leaf, quantizer in quantizers.items():
        try:
            found[leaf] = format_of(quantizer)
        except Unsayable as problem:
            raise _At(leaf, problem) from None
    return found


def _linear_format(quantizers: Mapping[str, nn.Module]) -> str:
    """Return the format of a linear, whose input and weight have to be in the same."""
    others = {leaf: child for leaf, child in quantizers.items() if leaf not in ("input_quantizer", "weight_quantizer")}
    found = _formats({leaf: child for leaf, child in quantizers.items() if leaf not in others})
    entering, weight = found.get("input_quantizer"), found.get("weight_quantizer")
    for leaf, child in others.items():
        _inert(leaf, child, "the output of a linear")
    if entering != weight:
        remedy = f"expected both in one format, {FORMATS}, or both off; save the state before any mtq.fold_weight"
        leaf, other = ("weight", "input") if weight else ("input", "weight")
        beside = described(quantizers[f"{other}_quantizer"]) if found[f"{other}_quantizer"] else "off"
        found_words = f"is in {described(quantizers[f'{leaf}_quantizer'])}, and {other}_quantizer {beside}"
        raise _At(f"{leaf}_quantizer", Unsayable(found_words, remedy))
    entering_quantizer: Any = quantizers["input_quantizer"]
    if entering is not None and entering_quantizer.is_static_block_quant:
        raise _At("input_quantizer", Unsayable("keeps a scale for each block of an input", f"expected {FORMATS}"))
    if smoothing_of(quantizers["weight_quantizer"]) is not None:
        raise _At("weight_quantizer", Unsayable("scales the weight by channel at each call (pre_quant_scale)"))
    return weight or BF16


def _rounded_in_attention(quantizers: Mapping[str, nn.Module]) -> set[str]:
    """Return what is rounded to FP8 in an attention: nothing, or query, key and value, and maybe what it gives.

    ModelOpt's torch model never rounds what softmax gives; its ONNX export does, as the kernel in FP8 does.
    """
    known = (*ATTENTION_OPERANDS, _SOFTMAX, ATTENTION_OUTPUT)
    for leaf, child in quantizers.items():
        if leaf not in known:
            _inert(leaf, child, "something in an attention")
    found = _formats({leaf: quantizers[leaf] for leaf in known if leaf in quantizers})
    for leaf, kind in found.items():
        if kind not in (None, FP8.name):
            raise _At(leaf, Unsayable(f"is in {described(quantizers[leaf])}", "attention is in FP8 here, or in 16 bit"))
        if smoothing_of(quantizers[leaf]) is not None:
            raise _At(leaf, Unsayable("scales by channel in an attention (pre_quant_scale)"))
    on = {leaf for leaf, kind in found.items() if kind} - {_SOFTMAX}
    missing = [leaf for leaf in ATTENTION_OPERANDS if leaf not in on]
    if on and missing:
        remedy = "expected FP8 for query, key and value, or for none of an attention"
        raise _At(min(on), Unsayable(f"is on, and {missing[0]} off", remedy))
    return on


def _require_all_inert(module: nn.Module, quantizers: Mapping[str, nn.Module]) -> None:
    for leaf, quantizer in quantizers.items():
        what = "a LayerNorm" if isinstance(module, nn.LayerNorm) else f"a {type(module).__name__.removeprefix('Quant')}"
        switch = _LAYER_NORMS if isinstance(module, nn.LayerNorm) and leaf == "input_quantizer" else ""
        _inert(leaf, quantizer, f"the {leaf.removesuffix('_quantizer')} of {what}", switch)


def _inert(leaf: str, quantizer: nn.Module, role: str, switch: str = "") -> None:
    try:
        require_inert(quantizer, role, switch or f'mtq.disable_quantizer(model, "*{leaf}")')
    except Unsayable as problem:
        raise _At(leaf, problem) from None


def _refuse(problems: Sequence[tuple[str, Unsayable]], state: str) -> None:
    name, problem = problems[0]
    alike = sum(other.remedy == problem.remedy for _, other in problems[1:])
    rest = len(problems) - 1 - alike
    more = f" (and {alike} more likewise)" if alike else ""
    raise BadCheckpoint(
        f"{state}: {name} {problem.found}{more}; {problem.remedy}"
        + (f"; {rest} more are refused for another reason" if rest else "")
    )


def _check_amax(model: nn.Module, contents: Contents, state: str) -> None:
    on = [f"{path}.{kind}_quantizer" for path, form in contents.formats.items() if form != BF16 for kind in _OPERANDS]
    on += [f"{path}.{leaf}" for path in contents.attentions for leaf in ATTENTION_OPERANDS]
    on += [f"{path}.{ATTENTION_OUTPUT}" for path, rounds_output in contents.attentions.items() if rounds_output]
    for name in on:
        quantizer: Any = model.get_submodule(name)
        amax = quantizer.global_amax if quantizer.is_static_block_quant else quantizer.amax
        if amax is None or amax.numel() != 1 or not math.isfinite(float(amax)) or float(amax) <= 0:
            raise BadAmax(f"{state}: {name} has amax {amax}; expected one finite number above 0: calibrate first")
        if quantizer.is_static_block_quant:
            _check_blocks(model, name, state)


_OPERANDS: Final = ("input", "weight")


def _check_blocks(model: nn.Module, name: str, state: str) -> None:
    quantizer: Any = model.get_submodule(name)
    weight: Any = model.get_submodule(name.rpartition(".")[0]).weight
    blocks = quantizer.amax
    if blocks is None or blocks.numel() * 16 != weight.numel() or not bool((blocks.isfinite() & (blocks >= 0)).all()):
        found = "none" if blocks is None else f"{blocks.numel()} of shape {list(blocks.shape)}"
        raise BadAmax(
            f"{state}: {name} keeps magnitudes of blocks ({found}); expected one for each 16 weights of "
            f"{list(weight.shape)}, finite: calibrate first"
        )


def tensors_of(model: nn.Module, contents: Contents) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of the linears and attentions that ModelOpt has changed, in the stored types.

    Nothing is computed anew: scales are the quantizers', codes those of the weights under them, and each linear keeps
    its own.

    Raises:
        BadAmax: some amax gives no scale.
        UnsupportedLinear: a linear in NVFP4 does not split into blocks of 16.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, kind in contents.formats.items():
        linear: Any = model.get_submodule(path)
        if kind != BF16:
            require_whole_blocks(path, linear.in_features, kind)
        if kind == NVFP4.name:
            tensors |= nvfp4_tensors(linear, [path], Fused(path, (linear.out_features,)))
        elif kind != BF16:
            tensors |= rounded_tensors(linear, path, kind)
        tensors |= {f"{path}.{name}": value for name, value in _beside(path, linear).items()}
    for path, rounds_output in contents.attentions.items():
        attention: Any = model.get_submodule(path)
        amax = {f"{path}.{leaf[0]}": float(getattr(attention, leaf).amax) for leaf in ATTENTION_OPERANDS}
        tensors |= fp8_attention.attention_scales(amax, [path])
        if rounds_output:
            tensors[f"{path}.{OUTPUT_SCALE}"] = fp8.tensor_scale(float(getattr(attention, ATTENTION_OUTPUT).amax))
    return tensors


def amax_of(model: nn.Module, contents: Contents) -> dict[str, float]:
    """Return the amax of every quantizer whose scale :func:`tensors_of` gives, by its name in the model."""
    amax: dict[str, float] = {}
    for path, kind in contents.formats.items():
        if kind != BF16:
            amax |= quantizer_amax(model.get_submodule(path), [path], kind)
    for path, rounds_output in contents.attentions.items():
        leaves = (*ATTENTION_OPERANDS, ATTENTION_OUTPUT) if rounds_output else ATTENTION_OPERANDS
        attention = model.get_submodule(path)
        amax |= {f"{path}.{leaf}": float(getattr(attention, leaf).amax) for leaf in leaves}
    return amax


def _beside(path: str, linear: Any) -> dict[str, torch.Tensor]:
    """Return what stands beside a linear's weight: the smoothing of its input, and its low-rank branch, in BF16.

    Raises:
        BadCheckpoint: one is not of the linear's shape.
    """
    if not hasattr(linear, "weight_quantizer"):
        return {}
    found: dict[str, torch.Tensor] = {}
    if (smoothing := smoothing_of(linear.input_quantizer)) is not None:
        found[SMOOTHING] = smoothing.reshape(-1)
    factors = {name: getattr(linear.weight_quantizer, name, None) for name in BRANCH}
    if all(factor is not None for factor in factors.values()):  # ModelOpt computes nothing with one alone
        found |= {name: factor for name, factor in factors.items() if factor is not None}
    rank = len(found[BRANCH[0]]) if BRANCH[0] in found else 0
    shapes = ((linear.in_features,), (rank, linear.in_features), (linear.out_features, rank))
    for name, shape in zip((SMOOTHING, *BRANCH), shapes, strict=True):
        if name in found and tuple(found[name].shape) != shape:
            raise BadCheckpoint(f"{path} has {name} of shape {list(found[name].shape)}; expected {list(shape)}")
    return {name: value.detach().to(torch.bfloat16) for name, value in found.items()}
