"""LoRAs of what is drawn: into the slots of a graph or an engine, or fused into a plain checkpoint."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from calibration.checkpoints.source import find_source
from calibration.lora.option import parse_lora
from fp4trt.errors import BadCheckpoint, BadLora
from fp4trt.file_kind import what_it_lacks
from generation.pipelines import Model

__all__ = ["given_loras", "with_loras"]


def given_loras(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """Return files and strengths of ``FILE[:STRENGTH]``.

    Raises:
        BadLora: a file is missing.
        BadOption: a strength is no number.
    """
    found = [parse_lora(text) for text in texts]
    if absent := next((path for path, _ in found if not path.is_file()), None):
        raise BadLora(f"{absent} {what_it_lacks(absent)}; expected a LoRA file there")
    return found


@contextlib.contextmanager
def with_loras(model: Model, loras: Sequence[tuple[Path, float]]) -> Iterator[tuple[Path, Path | None]]:
    """Give what is opened in place of an artifact, and the factors for its slots.

    Raises:
        BadLora: the artifact takes none, or these are another model's.
    """
    if not loras:
        yield model.path, None
    elif model.kind == "quantized checkpoint":
        raise BadLora(
            f"{model.path} is quantized, and LoRAs are not fused into codes; export it with --lora-rank and draw with "
            "the graph, or quantize with --lora"
        )
    elif model.kind == "checkpoint":
        yield find_source(model.path, lora=[f"{path}:{strength!r}" for path, strength in loras]), None
    elif not model.has_slots:
        raise BadLora(
            f"{model.path} has no slots for LoRAs; export its checkpoint with --lora-rank, or leave out --lora"
        )
    else:
        with tempfile.TemporaryDirectory(prefix="fp4trt-lora-") as folder:
            yield model.path, _factors(model, loras, Path(folder) / "lora.safetensors")


def _factors(model: Model, loras: Sequence[tuple[Path, float]], output: Path) -> Path:
    from calibration.lora_inputs import lora_inputs

    try:
        lora_inputs(list(loras), output, checkpoint=model.folder)
    except BadCheckpoint as error:
        raise BadLora(
            f"{model.path} takes LoRAs with the quantized checkpoint that it was exported of beside it ({error}); put "
            "it there"
        ) from None
    return output
