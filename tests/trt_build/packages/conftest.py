"""FLUX.1-dev's interface around the smallest blocks, and engines of it, made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.shared_folders import SharedFolder

DEV = {
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}


@pytest.fixture(scope="session")
def flux_dev(tiny_flux, shared_folder: SharedFolder) -> Path:
    """A quantized checkpoint with FLUX.1-dev's inputs and output, exported; not to be changed."""

    def make(folder: Path) -> None:
        from calibration import quantize
        from exporter import export
        from fp4trt.families import family_of

        source = tiny_flux(folder / "flux", **DEV)
        config = json.loads((source / "config.json").read_text())
        amax = dict.fromkeys(family_of(config).quantized(config), 3.0)
        (folder / "amax.json").write_text(json.dumps(amax))
        quantize(source, folder / "flux-fp4", recipe="nvfp4-ptq", calibration=folder / "amax.json")
        export(folder / "flux-fp4")

    return shared_folder("flux-dev", make) / "flux-fp4"


@pytest.fixture(scope="session")
def engines(flux_dev: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of it for the RTX 5090: `dynamic.engine` over the demo's sizes, `static.engine` at 512 pixels."""
    pytest.importorskip("tensorrt_rtx")
    from trt_build import build

    folder = tmp_path_factory.mktemp("engines")
    build(flux_dev, output=folder / "dynamic.engine", resolution="256:512:1024", batch="1:1:4", text=512)
    build(flux_dev, output=folder / "static.engine", resolution=512, batch=1, text=512)
    return folder
