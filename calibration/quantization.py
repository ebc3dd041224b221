"""``fp4trt quantize``: a BF16 checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from torch import nn

from calibration import ptq, sharing, write
from calibration.checkpoint import MANIFEST
from calibration.dataset import save_inputs
from calibration.errors import BadInputs
from calibration.input_amax import Calibration, calibration_from
from calibration.models import family_of
from calibration.models.family import require_blocks_of_16
from calibration.safetensors_file import sha256_of
from calibration.source import files_of, find_source, load_json, load_source, source_hashes

__all__ = ["RECIPES", "quantize"]

RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "nvfp4-ptq": {"method": "ptq", "format": "nvfp4", "algorithm": "max", "share_global_scales": True},
}
"""Recipe name to what it resolves to."""

_VERSIONED: Final = ("torch", "diffusers", "nvidia-modelopt", "numpy", "ml_dtypes")


def quantize(
    source: str | Path,
    output: str | Path,
    recipe: str = "nvfp4-ptq",
    calibration: str | Path | None = None,
    modelopt_state: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Quantize a BF16 checkpoint and write the quantized one.

    Args:
        source: BF16 checkpoint (see :func:`calibration.source.find_source`).
        output: folder of the result, written as ``OUTPUT.partial`` and renamed.
        recipe: a name of :data:`RECIPES`.
        calibration: maxima (``.json``) or captured inputs (``.safetensors``); None for the built-in model's words.
        modelopt_state: a state that ``modelopt.torch.opt.save`` wrote, in place of calibrating here.
        trust: allow reading that state, which is a pickle and can run code.
        force: replace an existing result.

    Returns:
        What the command prints as JSON: paths, counts, bytes, the cost of sharing scales.

    Raises:
        BadCheckpoint, BadInputs, BadAmax, OutputExists, UnsupportedLinear, Untrusted: naming what is wrong.
    """
    if recipe not in RECIPES:
        raise BadInputs(f"there is no recipe '{recipe}'; choose one of: {', '.join(RECIPES)}")
    if calibration is not None and modelopt_state is not None:
        raise BadInputs("both a calibration and a ModelOpt state were given; expected one of them")
    directory, folder = Path(output), find_source(source)
    write.refuse_foreign(directory, force)
    config = load_json(folder / "config.json")
    family = family_of(config)
    groups = family.groups(config)
    model, calibrated, expected = _quantized(folder, calibration, modelopt_state, trust)
    cost = sharing.share_and_measure(model, groups, expected)
    manifest = {
        "format": 1,
        "family": family.name,
        "recipe": {"name": recipe, **RECIPES[recipe]},
        "quantized": {"nvfp4": family.quantized(config)},
        "groups": groups,
        "amax": _amax(model, family.quantized(config)),
        "calibration": dict(calibrated.described),
        "sharing_cost": asdict(cost),
        "source": source_hashes(folder),
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }
    with write.replacing(directory, force) as partial:
        files = write.write_weights(partial, model, groups)
        written = {**config, "quantization_config": _quantization_config(model)}
        files["config.json"] = write.write_json(partial / "config.json", written)
        files |= _keep_calibration(partial, calibrated)
        write.write_json(partial / MANIFEST, {**manifest, "files": files})
    return _summary(directory, folder, manifest, cost)


def _quantized(
    folder: Path, calibration: str | Path | None, modelopt_state: str | Path | None, trust: bool
) -> tuple[nn.Module, Calibration, list[Any]]:
    """Return the model with calibrated quantizers, what they were calibrated on, and BF16 outputs to compare with."""
    config = load_json(folder / "config.json")
    paths = family_of(config).quantized(config)
    model = load_source(folder)
    for path in paths:
        require_blocks_of_16(path, model.get_submodule(path).in_features)  # type: ignore[arg-type]
    if modelopt_state is not None:
        from calibration.modelopt_state import restore

        model = restore(model, paths, modelopt_state, trust)
        return (
            model,
            Calibration({}, {"data": "modelopt state", "sha256": sha256_of(Path(modelopt_state))}),
            [],
        )
    calibrated = calibration_from(folder, calibration)
    expected = sharing.outputs(model, calibrated.calls)
    ptq.insert_quantizers(model, paths, calibrated.amax)
    return model, calibrated, expected


def _quantization_config(model: nn.Module) -> dict[str, Any]:
    """Return the ``quantization_config`` that ModelOpt's unified export writes for this model."""
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config

    return dict(convert_hf_quant_config_format(get_quant_config(model)))


def _keep_calibration(partial: Path, calibrated: Calibration) -> dict[str, str]:
    """Keep the inputs that were captured here, in a sub-folder where no loader takes them for weights."""
    if not calibrated.calls:
        return {}
    (partial / "calibration").mkdir()
    save_inputs(partial / "calibration" / "inputs.safetensors", calibrated.calls)
    return {"calibration/inputs.safetensors": sha256_of(partial / "calibration" / "inputs.safetensors")}


def _amax(model: nn.Module, paths: tuple[str, ...]) -> dict[str, float]:
    names = [f"{path}.{kind}" for path in paths for kind in ("input_quantizer", "weight_quantizer")]
    return {name: float(model.get_submodule(name).amax) for name in names}  # type: ignore[arg-type]


def _summary(directory: Path, folder: Path, manifest: Mapping[str, Any], cost: sharing.SharingCost) -> dict[str, Any]:
    def size(root: Path) -> int:
        return sum(file.stat().st_size for file in files_of(root))

    return {
        "checkpoint": str(directory.resolve()),
        "family": manifest["family"],
        "recipe": manifest["recipe"]["name"],
        "quantized_linears": len(manifest["quantized"]["nvfp4"]),
        "groups": len(manifest["groups"]),
        "bytes": size(directory),
        "source_bytes": size(folder),
        "sharing_cost": asdict(cost),
    }
