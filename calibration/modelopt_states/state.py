"""A model that somebody quantized with ModelOpt already: restore it from the file that ``mto.save`` wrote."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fp4trt.errors import BadCheckpoint, Untrusted

__all__ = ["Restored", "restore"]

_QUANTIZING: Final = ("quantize", "auto_quantize")
_CALIBRATED: Final = "_calibrate"
_EXPECTED: Final = "expected a file that modelopt.torch.opt.save wrote of this model"


@dataclass(frozen=True)
class Restored:
    """A model as ModelOpt left it.

    Attributes:
        model: with ModelOpt's quantizers, in BF16, in eval mode.
        algorithms: of the calibrations that it went through, by ModelOpt's names.
        dtype: that the state's own weights have.
    """

    model: nn.Module
    algorithms: tuple[str, ...]
    dtype: torch.dtype


def restore(model: nn.Module, state: str | Path, trust: bool) -> Restored:
    """Return ``model`` with the weights and quantizers that ``modelopt.torch.opt.save`` wrote.

    Args:
        model: the unquantized model, of the same config, in BF16; changed in place.
        state: the file.
        trust: the user's word that the file is his own; it is a pickle, and reading it can run code.

    Raises:
        Untrusted: without ``trust``.
        BadCheckpoint: the file is no such state, or of another model, or ModelOpt did more to it than quantize.
    """
    if not trust:
        raise Untrusted(f"{state} is a pickle, which can run code when read; add --trust if you made it yourself")
    if not Path(state).is_file():
        raise BadCheckpoint(f"{state} does not exist; {_EXPECTED}")
    from calibration.formats.modelopt_backend import mto
    from calibration.methods.modelopt.linears import quiet

    found = _read(state)
    algorithms = _algorithms(found["modelopt_state"], state)
    weights = found["model_state_dict"]
    dtype = _refuse_other_model(model, weights, state)
    try:
        with quiet():
            model = mto.restore_from_modelopt_state(model, found["modelopt_state"])
        model.load_state_dict(weights)
    except Exception as error:  # whatever ModelOpt may raise over what is in the file
        version = found["modelopt_state"].get("modelopt_version", "unknown")
        raise BadCheckpoint(f"{state}, of ModelOpt {version}, cannot be restored ({_reason(error)})") from None
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise BadCheckpoint(f"{state}: {name} holds NaN or infinite values; expected finite ones: calibrate again")
    _to_bfloat16(model)
    return Restored(model.eval().requires_grad_(False), algorithms, dtype)


def _read(state: str | Path) -> dict[str, Any]:
    """Return what the file holds, having checked its outline."""
    try:
        try:
            found = torch.load(state, map_location="cpu")
        except (
            pickle.UnpicklingError
        ):  # it holds objects of more classes than torch takes from anyone; but it is trusted
            found = torch.load(state, map_location="cpu", weights_only=False)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever unpickling a stranger's file may raise
        raise BadCheckpoint(f"{state} cannot be read as a ModelOpt state ({_reason(error)}); {_EXPECTED}") from None
    if isinstance(found, dict) and "modelopt_state_dict" in found:
        raise BadCheckpoint(
            f"{state} holds ModelOpt's state without the weights; expected both: save it with modelopt.torch.opt.save"
        )
    parts = [found.get(key) for key in ("modelopt_state", "model_state_dict")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, Mapping) for part in parts):
        kind = (
            f"a dict of {', '.join(map(str, list(found)[:3]))}, ..."
            if isinstance(found, dict)
            else type(found).__name__
        )
        raise BadCheckpoint(f"{state} holds {kind}; {_EXPECTED}")
    return dict(found)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _algorithms(modelopt_state: Mapping[str, Any], state: str | Path) -> tuple[str, ...]:
    """Return the calibrations that a state has been through; refuse whatever else was done to the model."""
    modes = modelopt_state.get("modelopt_state_dict")
    if not isinstance(modes, list) or not all(isinstance(mode, tuple | list) and len(mode) == 2 for mode in modes):
        raise BadCheckpoint(f"{state} has no list of what ModelOpt did; {_EXPECTED}")
    names = [str(name) for name, _ in modes]
    for name in names:
        if name not in _QUANTIZING and not name.endswith(_CALIBRATED):
            raise BadCheckpoint(
                f"{state}: ModelOpt did {name} to the model; expected quantization and calibration alone, with fake "
                "quantizers: save the state before that"
            )
    if not any(name in _QUANTIZING for name in names):
        raise BadCheckpoint(f"{state}: ModelOpt has not quantized the model; expected mtq.quantize before mto.save")
    found = [name.removesuffix(_CALIBRATED) for name in names if name.endswith(_CALIBRATED)]
    return tuple("none" if name == "_no" else name for name in found)


def _refuse_other_model(model: nn.Module, weights: Mapping[str, torch.Tensor], state: str | Path) -> torch.dtype:
    """Refuse a state whose weights are not the model's by name and shape; return the type of the widest."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    own = {name: value for name, value in weights.items() if not _is_quantizers(name)}
    found = {name: tuple(value.shape) for name, value in own.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            theirs, ours = (
                str(list(shape)) if shape is not None else "absent" for shape in (found.get(name), wanted.get(name))
            )
            raise BadCheckpoint(
                f"{state}: {name} is {theirs}, and {ours} in the checkpoint; expected a state of this model"
            )
    return max((value.dtype for value in own.values()), key=lambda dtype: (dtype.itemsize, dtype != torch.bfloat16))


def _is_quantizers(name: str) -> bool:
    return any(part.endswith("_quantizer") for part in name.split(".")[:-1])


def _to_bfloat16(model: nn.Module) -> None:
    """Bring what is computed with into the weights' type: quantizers keep theirs from where the model was saved."""
    for name, buffer in list(model.named_buffers()):
        path, _, leaf = name.rpartition(".")
        if leaf in ("_pre_quant_scale", "_svdquant_lora_a", "_svdquant_lora_b") and buffer.dtype != torch.bfloat16:
            setattr(model.get_submodule(path), leaf, buffer.to(torch.bfloat16))
