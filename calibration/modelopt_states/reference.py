"""What a restored ModelOpt model computes, and how far a checkpoint that was made of it is from that.

ModelOpt's modules and quantizers run as they are, on the CPU, with the arithmetic of the stored formats in the place of
kernels that want a GPU: a quantizer's amax, its smoothing and its branch are applied by ModelOpt's own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from calibration.checkpoints import quantized as checkpoint
from calibration.formats import fp8
from calibration.formats.attention_amax import ATTENTION
from calibration.formats.fp8_attention import PROBABILITY_SCALE
from calibration.modelopt_states.contents import ATTENTION_OPERANDS, ATTENTION_OUTPUT, Contents
from fp4trt.errors import BadCheckpoint, NotReproduced
from fp4trt.families import Family
from fp4trt.number_formats import BF16, FP8

__all__ = ["INPUTS", "LIMIT", "outputs_of", "require_reproduced"]

INPUTS: Final = 2
"""On how many inputs the two are compared."""

LIMIT: Final = 2**-12
"""Largest relative difference of the two, in L2. Equal arithmetic gives 0, which was measured of each of ModelOpt's
algorithms; the weight of one linear 2 % larger, a bias 10 % or an amax 1 % gave .0007 to .1 on the built-in model."""

_TOKENS: Final = (16, 8)
"""Tokens of the image and of the text."""


def outputs_of(model: nn.Module, contents: Contents, family: Family, config: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return what a restored model gives on some seeded inputs; its quantizers are changed to compute on the CPU.

    Raises:
        BadCheckpoint: it gives NaN or infinity.
    """
    _compute_as_stored(model, contents)
    outputs = _run(model, family, config)
    if not all(output.isfinite().all() for output in outputs):
        raise BadCheckpoint("the model of the ModelOpt state gives NaN or infinite values; expected finite ones")
    return outputs


def require_reproduced(
    folder: Path, expected: list[torch.Tensor], family: Family, config: Mapping[str, Any], state: str
) -> float:
    """Load a checkpoint and return its relative difference, in L2, to what was expected of it.

    Raises:
        NotReproduced: it is beyond rounding.
    """
    found = torch.cat([output.flatten() for output in _run(checkpoint.load(folder), family, config)])
    wanted = torch.cat([output.flatten() for output in expected])
    difference = float((found - wanted).norm() / wanted.norm())
    if not difference <= LIMIT:
        raise NotReproduced(
            f"the result does not compute what the model of {state} computes: relative difference {difference:.4g} on "
            f"{INPUTS} inputs, expected at most {LIMIT:.4g}; nothing was kept: please report this state's config"
        )
    return difference


def _run(model: nn.Module, family: Family, config: Mapping[str, Any]) -> list[torch.Tensor]:
    outputs = []
    for seed in range(INPUTS):
        call = family.example_inputs(config, (1, *_TOKENS), seed, torch.bfloat16)
        with torch.no_grad():
            outputs += [output.float() for output in model(**call, return_dict=False)]
    return outputs


def _compute_as_stored(model: nn.Module, contents: Contents) -> None:
    """Let every quantizer that is on compute as the checkpoint's formats do."""
    from calibration.formats.modelopt_backend import BACKENDS

    for path, kind in contents.formats.items():
        for operand in ("input", "weight") if kind != BF16 else ():
            quantizer: Any = model.get_submodule(f"{path}.{operand}_quantizer")
            quantizer.backend = BACKENDS[kind]
    for path in contents.attentions:
        attention: Any = model.get_submodule(path)
        for leaf in (*ATTENTION_OPERANDS, ATTENTION_OUTPUT):
            getattr(attention, leaf).backend = BACKENDS[FP8.name]
        attention._functionals_to_replace = [(nn.functional, ATTENTION.__name__, _fp8_attention)]


def _fp8_attention(module: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Attention with ModelOpt's own quantizers, and what softmax gives rounded as in ModelOpt's ONNX export."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    operands = [given.pop(name) for name in ("query", "key", "value")]
    assert not any(given.values()), f"an attention in FP8 has no {', '.join(given)}"
    quantizers = [getattr(module, leaf) for leaf in ATTENTION_OPERANDS]
    q, k, v = (quantizer(operand) for quantizer, operand in zip(quantizers, operands, strict=True))
    scores = (q @ k.transpose(-1, -2)).float() * torch.tensor(q.shape[-1] ** -0.5)
    rounded = fp8.fake_quantize(scores.softmax(-1), torch.tensor(PROBABILITY_SCALE)).to(v.dtype)
    output: torch.Tensor = getattr(module, ATTENTION_OUTPUT)(rounded @ v)
    return output
