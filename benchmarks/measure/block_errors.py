"""Say, last, as JSON, how far each quantized block's output is from the plain one's, both given the plain inputs.

`python benchmarks/measure/block_errors.py SOURCE RESULT INPUTS`. Both run in FP32, on the first captured call and on
one of the same shape that calibration has not seen. An error is the L2 norm of what differs in all that a block
returns, relative to what the block adds to what enters it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

import fp4trt
from calibration.checkpoints.plain import model_class
from calibration.inputs.captured import Inputs, load_inputs
from fp4trt.families import family_of

UNSEEN = 1000
"""Seed of the call that calibration has not seen."""

Tensors = dict[str, torch.Tensor]


def errors_of(source: Path, result: Path, inputs: Path) -> dict[str, dict[str, float]]:
    """Return block to error by call."""
    plain = model_class(family_of(_config(source))).from_pretrained(source, torch_dtype=torch.float32)
    calls = _calls(source, inputs)
    seen = {name: _run(plain.eval(), call) for name, call in calls.items()}
    del plain
    quantized = fp4trt.load(result, dtype=torch.float32).eval()
    found: dict[str, dict[str, float]] = {}
    for name, blocks in seen.items():
        for path, (arguments, wanted) in blocks.items():
            with torch.no_grad():
                given = _named(quantized.get_submodule(path)(**arguments))
            missed = sum(float((given[key] - value).square().sum()) for key, value in wanted.items())
            added = sum(float((value - arguments[key]).square().sum()) for key, value in wanted.items())
            found.setdefault(path, {})[name] = (missed / added) ** 0.5
    return found


def _config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    return config


def _calls(source: Path, inputs: Path) -> dict[str, Inputs]:
    captured, config = load_inputs(inputs)[0], _config(source)
    shape = (1, captured["hidden_states"].shape[1], captured["encoder_hidden_states"].shape[1])
    other = family_of(config).example_inputs(config, shape, UNSEEN, torch.bfloat16)
    other = {**captured, **other, "timestep": torch.tensor([0.5])}
    return {"captured": captured, "unseen": other}


def _run(model: nn.Module, call: Mapping[str, torch.Tensor]) -> dict[str, tuple[Any, Tensors]]:
    """Return what each block was called with and what it gave."""
    seen: dict[str, tuple[Any, Tensors]] = {}

    def keep(path: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert not args, "diffusers gives all by name"
        seen[path] = (kwargs, _named(output))

    paths = family_of(dict(model.config)).blocks(model.config)
    handles = [
        model.get_submodule(path).register_forward_hook(functools.partial(keep, path), with_kwargs=True)
        for path in paths
    ]
    with torch.no_grad():
        model(**{name: value.float() if value.is_floating_point() else value for name, value in call.items()})
    for handle in handles:
        handle.remove()
    return seen


def _named(output: tuple[torch.Tensor, torch.Tensor]) -> Tensors:
    return dict(zip(("encoder_hidden_states", "hidden_states"), output, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(errors_of(*map(Path, sys.argv[1:]))))
