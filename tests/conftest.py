"""What several rooms' tests share: the built-in model, quantized and exported once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests import warm_python
from tests.shared_folders import SharedFolder, shared_folder
from tests.traced_once import share_traces, shared_traces

__all__ = ["shared_folder", "shared_traces"]  # fixtures

# The models of the tests are so small that a second thread costs more than it brings. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Not the user's cache.
os.environ.setdefault("FP4TRT_CACHE", str(Path(tempfile.gettempdir()) / "fp4trt-tests-cache"))

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


def pytest_runtest_setup() -> None:
    share_traces()


_KILLED_AFTER = """
import os, signal, sys
from calibration.by_block import progress
import fp4trt

finish = progress.BlockCheckpoint.finish


def finish_and_die(self, *of):
    finish(self, *of)
    if len(self.results) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)


progress.BlockCheckpoint.finish = finish_and_die
sys.exit(fp4trt.run(sys.argv[2:]))
"""


@pytest.fixture
def kill_after() -> Callable[..., None]:
    """Return what runs a command and kills it once some blocks are finished."""

    def run(blocks: int, *arguments: object) -> None:
        if sys.platform == "win32":
            pytest.skip("kills as POSIX does")
        status, printed = warm_python.run(_KILLED_AFTER, blocks, *arguments)
        assert status == -signal.SIGKILL, printed

    return run


@pytest.fixture(scope="session")
def built_in() -> Path:
    """The built-in model's folder, in BF16."""
    from calibration.checkpoints.plain import BUILT_IN, find_source

    return find_source(BUILT_IN)


@pytest.fixture(scope="session")
def digits(built_in: Path, shared_folder: SharedFolder) -> Path:
    """The first of the built-in model's double and of its single blocks: trained weights, a third of the work."""

    def make(folder: Path) -> None:
        from diffusers import FluxTransformer2DModel

        from calibration.checkpoints.plain import load_source
        from fp4trt.json_file import load_json

        config = load_json(built_in / "config.json") | {"num_layers": 1, "num_single_layers": 1}
        model = FluxTransformer2DModel.from_config(config)
        wanted, state = model.state_dict().keys(), load_source(built_in).state_dict()
        model.load_state_dict({name: value for name, value in state.items() if name in wanted})
        model.bfloat16().save_pretrained(folder / "digits")

    return shared_folder("short", make) / "digits"


@pytest.fixture(scope="session")
def quantized_built_in(built_in: Path, five_calls: Path, shared_folder: SharedFolder) -> Path:
    """The whole built-in model after plain post-training quantization, exported; not to be changed."""

    def make(folder: Path) -> None:
        from calibration import quantize
        from exporter import export

        quantize(built_in, folder / "digits-fp4", recipe="nvfp4-ptq", calibration=five_calls)
        export(folder / "digits-fp4")

    return shared_folder("quantized-built-in", make) / "digits-fp4"


@pytest.fixture(scope="session")
def quantized_digits(digits: Path, five_calls: Path, shared_folder: SharedFolder) -> Path:
    """It after plain post-training quantization, exported; not to be changed."""

    def make(folder: Path) -> None:
        from calibration import quantize
        from exporter import export

        quantize(digits, folder / "digits-fp4", recipe="nvfp4-ptq", calibration=five_calls)
        export(folder / "digits-fp4")

    return shared_folder("quantized", make) / "digits-fp4"


@pytest.fixture(scope="session")
def fp8_digits(digits: Path, quantized_digits: Path, shared_folder: SharedFolder) -> Path:
    """The same model quantized with its modulation in FP8, and exported; not to be changed."""

    rules = [{"linears": "*.norm*.linear", "format": "fp8"}]
    return (
        shared_folder("fp8", _by_rules(digits, quantized_digits, "modulation-in-fp8", rules, "digits-fp8"))
        / "digits-fp8"
    )


@pytest.fixture(scope="session")
def mixed_digits(digits: Path, quantized_digits: Path, shared_folder: SharedFolder) -> Path:
    """The same model in NVFP4, FP8 and MXFP8, exported, with its recipe and amax beside it; not to be changed."""
    rules = [
        {"linears": "transformer_blocks.*.norm*.linear", "format": "fp8"},
        {"linears": "single_transformer_blocks.*", "format": "mxfp8"},
    ]
    return shared_folder("mixed", _by_rules(digits, quantized_digits, "mixed", rules, "digits-mixed")) / "digits-mixed"


def _by_rules(
    digits: Path, quantized: Path, name: str, rules: Sequence[dict[str, str]], output: str
) -> Callable[[Path], None]:
    """Return what quantizes the model by the rules of a recipe, and exports it."""

    def make(folder: Path) -> None:
        from calibration import quantize
        from exporter import export

        measured = json.loads((quantized / "fp4trt.json").read_text(encoding="utf-8"))["amax"]
        inputs = {name.removesuffix(".input_quantizer"): amax for name, amax in measured.items() if ".input" in name}
        (folder / "amax.json").write_text(json.dumps(inputs), encoding="utf-8")
        recipe = {"name": name, "method": {"name": "ptq"}, "formats": {"rules": list(rules)}}
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        quantize(digits, folder / output, recipe=folder / "recipe.yaml", calibration=folder / "amax.json")
        export(folder / output)

    return make


@pytest.fixture(scope="session")
def bfloat16_digits(quantized_digits: Path, shared_folder: SharedFolder) -> Path:
    """The quantized model exported with BF16 scales; not to be changed."""

    def make(folder: Path) -> None:
        from exporter import export

        shutil.copytree(quantized_digits, folder / "digits-fp4")
        export(folder / "digits-fp4", scale_dtype="bfloat16", force=True)

    return shared_folder("bfloat16", make) / "digits-fp4"


@pytest.fixture(scope="session")
def copied_digits(quantized_digits: Path, shared_folder: SharedFolder) -> Path:
    """The quantized model's graph in a folder of its own, with its weights; not to be changed."""

    def make(folder: Path) -> None:
        from exporter import export

        result = export(quantized_digits, folder / "model.onnx")
        assert "outside" in result["copied_because"]

    return shared_folder("copied", make)


@pytest.fixture(scope="session")
def plain_digits(digits: Path, shared_folder: SharedFolder) -> Path:
    """The same model in BF16, exported in place; not to be changed."""

    def make(folder: Path) -> None:
        from exporter import export

        (folder / "digits").mkdir()
        for name in ("config.json", "diffusion_pytorch_model.safetensors"):
            shutil.copy(digits / name, folder / "digits")
        export(folder / "digits", precision="bf16")

    return shared_folder("plain", make) / "digits"


@pytest.fixture(scope="session")
def copied_plain(digits: Path, shared_folder: SharedFolder) -> Path:
    """The same model's BF16 graph in a folder of its own, by the command; not to be changed."""

    def make(folder: Path) -> None:
        import fp4trt

        assert fp4trt.run(["export", str(digits), "--precision", "bf16", "-o", str(folder)]) == 0

    return shared_folder("plain-copied", make)


@pytest.fixture(scope="session")
def five_calls(shared_folder: SharedFolder) -> Path:
    """Calls of the built-in model over a short schedule, to calibrate on; not to be changed."""

    def make(folder: Path) -> None:
        from calibration.digits.model import load_transformer
        from calibration.digits.sampling import capture
        from calibration.inputs.captured import save_inputs

        save_inputs(folder / "inputs.safetensors", capture(load_transformer(), seeds=(0,), steps=5))

    return shared_folder("five-calls", make) / "inputs.safetensors"


@pytest.fixture(scope="session")
def svdquant_checkpoint(digits: Path, five_calls: Path, shared_folder: SharedFolder) -> Path:
    """The same model quantized by SVDQuant on a few of its calls, not exported; not to be changed."""

    def make(folder: Path) -> None:
        from calibration import quantize

        quantize(digits, folder / "digits-svdquant", recipe="svdquant-r8", calibration=five_calls)

    return shared_folder("svdquant", make) / "digits-svdquant"


@pytest.fixture(scope="session")
def svdquant_digits(svdquant_checkpoint: Path, shared_folder: SharedFolder) -> Path:
    """The same, exported; not to be changed."""

    def make(folder: Path) -> None:
        from exporter import export

        export(shutil.copytree(svdquant_checkpoint, folder / "digits-svdquant"))

    return shared_folder("svdquant-exported", make) / "digits-svdquant"


@pytest.fixture
def copy_of_digits(quantized_digits: Path, tmp_path: Path) -> Path:
    """A copy of the quantized model that a test may change."""
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

        from calibration.checkpoints.quantized import WEIGHTS
        from fp4trt.checkpoint_manifest import MANIFEST
        from fp4trt.safetensors_file import sha256_of

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
    digits: Path, five_calls: Path, fp8_attention_recipe: Path, shared_folder: SharedFolder
) -> Path:
    """The same model with attention in FP8, quantized and exported; not to be changed."""

    def make(folder: Path) -> None:
        from calibration import quantize
        from exporter import export

        quantize(digits, folder / "digits-fp8", recipe=fp8_attention_recipe, calibration=five_calls)
        export(folder / "digits-fp8")

    return shared_folder("fp8-attention", make) / "digits-fp8"


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


@pytest.fixture(scope="session")
def flux2_in_mxfp8(shared_folder: SharedFolder) -> Path:
    """A tiny FLUX.2 with random weights in MXFP8, exported; not to be changed."""

    def make(folder: Path) -> None:
        import torch
        from diffusers import Flux2Transformer2DModel

        from calibration import quantize
        from exporter import export

        torch.manual_seed(0)
        model = Flux2Transformer2DModel(
            in_channels=64,
            num_layers=2,
            num_single_layers=3,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
            joint_attention_dim=32,
            timestep_guidance_channels=32,
        )
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(folder / "flux2")
        quantize(folder / "flux2", folder / "flux2-mxfp8", recipe="mxfp8-ptq")
        export(folder / "flux2-mxfp8")

    return shared_folder("flux2", make) / "flux2-mxfp8"


@pytest.fixture(scope="session")
def pipeline(tiny_flux: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline with random weights, as diffusers stores one; not to be changed."""
    pytest.importorskip("transformers")
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "cat": 4, "dog": 5, "<unk>": 6}
    split = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, model_max_length=77, **names)
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 7}
    clip = CLIPTextConfig(hidden_size=16, intermediate_size=16, projection_dim=16, eos_token_id=2, **sizes)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            latent_channels=16, block_out_channels=(32,), norm_num_groups=8, sample_size=32, shift_factor=0.1
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=7)),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel.from_pretrained(tiny_flux(folder / "seed")),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"
