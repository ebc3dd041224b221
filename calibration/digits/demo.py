"""The whole road on the built-in model: quantize, export, validate, build, and look at the pictures.

Every stage runs as the command that a user would type, in a process of its own; what one leaves on disk, the next
reads. So the demo imports no other room, and its log can be copied into a terminal.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import click

from calibration.digits.errors import StageFailed
from calibration.source import BUILT_IN
from calibration.write import replacing, write_json

__all__ = ["demo", "table"]

GRID: Final = "digits.png"
SUMMARY: Final = "demo.json"
_NAME: Final = "NVFP4"

_PATIENCE_SECONDS: Final = 3.0
_INTERRUPTED: Final = 2
"""The status of a command that Ctrl-C ended."""

EVALUATION_SEED: Final = 1000
"""Of the starting noise; calibration takes seeds 0 to 3."""


def demo(directory: Path, gpu: str = "rtx5090", images: int = 500, force: bool = False) -> dict[str, Any]:
    """Walk the road and return what the command prints as JSON.

    Args:
        directory: becomes the quantized checkpoint, with ``model.onnx``, ``validation/``, the engine, ``digits.png``
            and ``demo.json`` in it; written as ``DIRECTORY.partial`` and renamed.
        gpu: the target of the engine.
        images: how many digits to draw with each model for accuracy, PSNR and velocity error.
        force: replace an earlier result.

    Raises:
        OutputExists: the directory holds something that fp4trt did not write.
        StageFailed: a command ended with an error, which it has printed; carries its exit status.
    """
    # A model this small is slower on two threads than on one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with replacing(directory, force) as partial:
        result = _walk(partial / directory.name, gpu, images)
        for path in (partial / directory.name).iterdir():
            os.replace(path, partial / path.name)
        (partial / directory.name).rmdir()
    return {
        **result,
        "checkpoint": str(directory.resolve()),
        **{key: str((directory / result[key]).resolve()) for key in ("onnx", "engine", "grid", "report")},
    }


def _walk(directory: Path, gpu: str, images: int) -> dict[str, Any]:
    """Run every stage into a folder; paths in the result are relative to it."""
    quantized = _run("quantize", BUILT_IN, "-o", str(directory))
    exported = _run("export", str(directory))
    validation = _run("validate", str(directory), may_fail=True)
    built = _run("build", str(directory), "--gpu", gpu)
    quality = _measure(directory, images)
    result = {
        "onnx": Path(exported["onnx"]).name,
        "engine": Path(built["engine"]).name,
        "grid": GRID,
        "report": "validation/report.html",
        "validation": {"passed": validation["passed"], "gates": validation["gates"]},
        "bf16_bytes": quantized["source_bytes"],
        "nvfp4_bytes": quantized["bytes"],
        "quantized_linears": quantized["quantized_linears"],
        "sharing_cost": quantized["sharing_cost"],
        "gpu": gpu,
        **{key: built[key] for key in ("engine_bytes", "fp4_gemms", "fp4_linears")},
        **quality,
        "passed": bool(validation["passed"]),
    }
    write_json(directory / SUMMARY, result)
    return result


def _run(*arguments: str, may_fail: bool = False) -> dict[str, Any]:
    """Run one fp4trt command, its human lines passing through to stderr, and return its JSON."""
    click.echo(f"$ fp4trt {' '.join(arguments)}")
    sys.stdout.flush()
    command = [sys.executable, "-m", "fp4trt", *arguments, "--json"]
    status, printed = _completed(command)
    if status and not (may_fail and status == 1 and printed.strip()):
        raise StageFailed(f"its stage {arguments[0]} ended with status {status}", status)
    result: dict[str, Any] = json.loads(printed)
    return result


def _completed(command: list[str]) -> tuple[int, str]:
    """Run a stage to its end; return its status and what it printed.

    Raises:
        click.exceptions.Exit: Ctrl-C ended the stage, which has said so itself.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as stage:
        try:
            printed, _ = stage.communicate()
        except KeyboardInterrupt:
            # A terminal interrupts the stage too. Only where it was not, it has to hear of it from here.
            try:
                stage.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                stage.terminate() if sys.platform == "win32" else stage.send_signal(signal.SIGINT)
                stage.wait()
            if stage.returncode == _INTERRUPTED:
                raise click.exceptions.Exit(_INTERRUPTED) from None
            raise
        return stage.returncode, printed


def _measure(directory: Path, images: int) -> dict[str, Any]:
    """Compare both models on prompts and noise that calibration has not seen, and draw some of the digits."""
    import torch

    from calibration.checkpoint import load
    from calibration.comparison.statistics import estimate
    from calibration.digits.grid import grid
    from calibration.digits.model import load_transformer
    from calibration.digits.quality import compare

    click.echo(f"drawing {images} digits with each model")
    reference, quantized = load_transformer(), load(directory, torch.float32)
    models = {_NAME: quantized}
    compared = compare(reference, models, (EVALUATION_SEED,), images)
    grid(reference, models, directory / GRID, seed=EVALUATION_SEED)
    return {
        "accuracy_bf16": estimate(compared.reference["recognised"]).mean,
        "accuracy_nvfp4": compared.estimate(_NAME, "recognised").mean,
        "psnr_db": compared.estimate(_NAME, "psnr_db").mean,
        "velocity_error": compared.estimate(_NAME, "velocity_error").mean,
        "images": images,
    }


def table(result: dict[str, Any]) -> str:
    """Return the demo's one table: what was before, what is after."""
    verdict = "passed" if result["validation"]["passed"] else "FAILED"
    rows = [
        ("", "BF16", "NVFP4"),
        ("checkpoint, bytes", f"{result['bf16_bytes']:,}", f"{result['nvfp4_bytes']:,}"),
        ("digits recognised", f"{result['accuracy_bf16']:.1%}", f"{result['accuracy_nvfp4']:.1%}"),
        ("image PSNR", "", f"{result['psnr_db']:.1f} dB"),
        ("velocity error", "", f"{result['velocity_error']:.3f}"),
        ("validation of the graph", "", verdict),
        (f"engine for {result['gpu']}, bytes", "", f"{result['engine_bytes']:,}"),
        ("FP4 GEMMs", "", str(result["fp4_gemms"])),
        ("linears they cover", "", f"{result['fp4_linears']} of {result['quantized_linears']}"),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[1]), *lines[1:]])
