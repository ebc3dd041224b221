"""What all rooms share: the front door, model families, what the files hold. No torch.

This package imports no room, and every room may import it: commands and verbs name their room as a string, which is
imported when one is called. The verbs, such as :func:`quantize`, are those of the command line.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from fp4trt.cli import COMMANDS, EXTRAS, Entry, main, run
from fp4trt.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

    bench: Callable[..., Any]
    build: Callable[..., Any]
    calibrate: Callable[..., Any]
    compare: Callable[..., Any]
    convert: Callable[..., Any]
    export: Callable[..., Any]
    generate: Callable[..., Any]
    inspect: Callable[..., Any]
    lint: Callable[..., Any]
    load: Callable[..., Any]
    lora: Callable[..., Any]
    package: Callable[..., Any]
    pipeline_transformer: Callable[..., Any]
    plan: Callable[..., Any]
    quantize: Callable[..., Any]
    search: Callable[..., Any]
    teacache: Callable[..., Any]
    validate: Callable[..., Any]

__all__ = [
    "COMMANDS",
    "EXTRAS",
    "Entry",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "compare",
    "convert",
    "export",
    "generate",
    "inspect",
    "lint",
    "load",
    "lora",
    "main",
    "package",
    "pipeline_transformer",
    "plan",
    "quantize",
    "run",
    "search",
    "teacache",
    "validate",
]

VERBS: Final = {
    "bench": "generation.bench.bench:bench",
    "build": "trt_build.builder:build",
    "calibrate": "calibration.by_block.calibration:calibrate",
    "compare": "generation.comparison.compare:compare",
    "convert": "calibration.interchange.convert:convert",
    "export": "exporter.checkpoint_or_graph:export",
    "generate": "generation.generate.generate:generate",
    "inspect": "onnx_functions.inspection.inspect:inspect",
    "lint": "onnx_functions.linting:lint",
    "load": "calibration.checkpoints.quantized:load",
    "lora": "calibration.lora_inputs:lora_inputs",
    "package": "trt_build.packages.package:package",
    "pipeline_transformer": "generation.pipelines.transformer:pipeline_transformer",
    "plan": "generation.planning.plan:plan",
    "quantize": "calibration.quantization:quantize",
    "search": "calibration.layer_choice.search:search",
    "teacache": "generation.step_caching.teacache:teacache",
    "validate": "onnx_functions.validation.run_gates:validate",
}
"""Verb to the function that does it."""


def __getattr__(name: str) -> Any:
    """Load a verb with its dependencies only when it is asked for (PEP 562)."""
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, function = VERBS[name].partition(":")
    return getattr(importlib.import_module(module), function)
