"""What several rooms' tests share: the built-in model, quantized and exported once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# The models of the tests are so small that a second thread costs more than it brings. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job ignores Ctrl-C, and so would every command that a test starts and then interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no CUDA GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))


_KILLED_AFTER = """
import os, signal, sys
from calibration import block_checkpoint
import fp4trt

finish = block_checkpoint.BlockCheckpoint.finish


def finish_and_die(self, block, result):
    finish(self, block, result)
    if len(self.results) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)


block_checkpoint.BlockCheckpoint.finish = finish_and_die
sys.exit(fp4trt.run(sys.argv[2:]))
"""


@pytest.fixture
def kill_after() -> Callable[..., None]:
    """Return what runs a command and kills it once some blocks are finished."""

    def run(blocks: int, *arguments: object) -> None:
        if sys.platform == "win32":
            pytest.skip("kills as POSIX does")
        command = [sys.executable, "-c", _KILLED_AFTER, str(blocks), *map(str, arguments)]
        root = Path(__file__).parents[1]
        assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == -9

    return run


@pytest.fixture(scope="session")
def digits() -> Path:
    """The built-in model's folder, in BF16."""
    from calibration.source import BUILT_IN, find_source

    return find_source(BUILT_IN)


@pytest.fixture(scope="session")
def quantized_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model after plain post-training quantization, exported; not to be changed."""
    from calibration import quantize
    from exporter import export

    directory = tmp_path_factory.mktemp("quantized") / "digits-fp4"
    quantize("digits", directory, "nvfp4-ptq")
    export(directory)
    return directory


@pytest.fixture(scope="session")
def fp8_digits(quantized_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model quantized with its modulation in FP8, and exported; not to be changed."""
    from calibration import quantize
    from exporter import export

    folder = tmp_path_factory.mktemp("fp8")
    measured = json.loads((quantized_digits / "fp4trt.json").read_text(encoding="utf-8"))["amax"]
    inputs = {name.removesuffix(".input_quantizer"): amax for name, amax in measured.items() if ".input" in name}
    (folder / "amax.json").write_text(json.dumps(inputs), encoding="utf-8")
    rules = {"rules": [{"linears": "*.norm*.linear", "format": "fp8"}]}
    recipe = {"name": "modulation-in-fp8", "method": {"name": "ptq"}, "formats": rules}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    quantize("digits", folder / "digits-fp8", folder / "recipe.yaml", folder / "amax.json")
    export(folder / "digits-fp8")
    return folder / "digits-fp8"


@pytest.fixture(scope="session")
def bfloat16_digits(quantized_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quantized built-in model exported with BF16 scales; not to be changed."""
    from exporter import export

    directory = tmp_path_factory.mktemp("bfloat16") / "digits-fp4"
    shutil.copytree(quantized_digits, directory)
    export(directory, scale_dtype="bfloat16", force=True)
    return directory


@pytest.fixture(scope="session")
def svdquant_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model quantized by SVDQuant on a few of its calls, not exported; not to be changed."""
    from calibration import quantize
    from calibration.dataset import save_inputs
    from calibration.digits.model import load_transformer
    from calibration.digits.sampling import capture

    folder = tmp_path_factory.mktemp("svdquant")
    save_inputs(folder / "inputs.safetensors", capture(load_transformer(), seeds=(0,), steps=5))
    quantize("digits", folder / "digits-svdquant", "svdquant-r8", folder / "inputs.safetensors")
    return folder / "digits-svdquant"


@pytest.fixture(scope="session")
def svdquant_digits(svdquant_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, exported; not to be changed."""
    from exporter import export

    directory = shutil.copytree(svdquant_checkpoint, tmp_path_factory.mktemp("exported") / "digits-svdquant")
    export(directory)
    return directory


@pytest.fixture
def copy_of_digits(quantized_digits: Path, tmp_path: Path) -> Path:
    """A copy of the quantized built-in model that a test may change."""
    return shutil.copytree(quantized_digits, tmp_path / "digits-fp4")


@pytest.fixture
def hub_snapshot() -> Callable[..., Path]:
    """Return a maker of snapshots as a hub's cache has them: every file is a link to a blob."""

    def make(source: Path, hub: Path, names: Sequence[str], inside: str = "") -> Path:
        snapshot, blobs = hub / "models--a--b" / "snapshots" / "4d7a" / inside, hub / "models--a--b" / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            blob = shutil.copyfile(source / name, blobs / f"sha-{len(list(blobs.iterdir()))}")
            (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
        return snapshot

    return make


@pytest.fixture(scope="session")
def fp8_attention(quantized_digits: Path) -> Callable[..., Path]:
    """Return a maker of quantized built-in models some of whose attentions are in FP8, not yet exported."""

    def make(directory: Path, attentions: Sequence[str]) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        from calibration.checkpoint import MANIFEST, WEIGHTS
        from calibration.safetensors_file import sha256_of

        shutil.copytree(quantized_digits, directory, ignore=shutil.ignore_patterns("*.onnx"))
        tensors = load_file(directory / WEIGHTS)
        amax = {"q_scale": 8.5, "k_scale": 9.0, "v_scale": 6.0}
        scales = {name: torch.tensor(value / 448) for name, value in amax.items()}
        tensors |= {f"{path}.{name}": scale.clone() for path in attentions for name, scale in scales.items()}
        save_file(tensors, directory / WEIGHTS)
        manifest = json.loads((directory / MANIFEST).read_text())
        manifest["attention"] = {"fp8": list(attentions)}
        manifest["files"][WEIGHTS] = sha256_of(directory / WEIGHTS)
        (directory / MANIFEST).write_text(json.dumps(manifest))
        return directory

    return make


@pytest.fixture(scope="session")
def fp8_attention_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain PTQ with attention in FP8."""
    path = tmp_path_factory.mktemp("recipe") / "fp8-attention.yaml"
    path.write_text("name: nvfp4-ptq-fp8-attention\nmethod: {name: ptq}\nattention: fp8\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def fp8_attention_digits(
    quantized_digits: Path, fp8_attention_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The built-in model with attention in FP8, quantized and exported; not to be changed."""
    from calibration import quantize
    from exporter import export

    directory = tmp_path_factory.mktemp("fp8-attention") / "digits-fp8"
    calls = quantized_digits / "calibration" / "inputs.safetensors"
    quantize("digits", directory, recipe=fp8_attention_recipe, calibration=calls)
    export(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_flux() -> Callable[..., Path]:
    """Return a maker of tiny FLUX checkpoints with random weights."""

    def make(directory: Path, **changes: object) -> Path:
        import torch
        from diffusers import FluxTransformer2DModel

        sizes = {
            "in_channels": 64,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
        }
        torch.manual_seed(0)
        model = FluxTransformer2DModel(**{**sizes, **changes})
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(directory)
        return directory

    return make
