"""NVIDIA's demoDiffusion (NVIDIA/TensorRT, demo/Diffusion): a graph in its place, a tree of its own, or an engine.

The demo takes any ONNX file by ``--custom-onnx-paths``. It builds no engine where one of the name is there already,
whatever it was built of, so that the command names one after the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fp4trt.errors import BadOption, UnfitArtifact
from trt_build.packages.artifacts import data_of, fingerprint, is_engine, open_engine, open_graph
from trt_build.packages.contracts import TITLES, Contract
from trt_build.packages.fit import extents_in, fit_of, fitting, picture_of, precision_of
from trt_build.packages.placing import Content, Copied, Linked
from trt_build.packages.plan import PROMPT, TOKEN, Asked, Plan, require_plain, shell_line

__all__ = ["plan_for_demo_diffusion"]

_PROGRAM: Final = "demo-diffusion"
_WHERE: Final = "in demo/Diffusion of a clone of NVIDIA/TensorRT"
_GIVEN: Final = {"canny": "--control-image", "depth": "--control-image", "kontext": "--kontext-image"}
"""The option that names the picture which a model reads."""

_FLAGS: Final = {"fp4": ("--fp4",), "fp8": ("--fp8", "--quantization-level", "4"), "bf16": ("--bf16",)}
_FOLDERS: Final = {"fp4": "transformer_fp4", "fp8": "transformer_fp8.l4.0.bs2.c32.p1.0.a0.8", "bf16": "transformer"}
"""What the demo calls the folder of a transformer, with the options above and its own defaults."""


def plan_for_demo_diffusion(artifact: Path, folder: Path | None, asked: Asked) -> Plan:
    """Return the plan of what the demo takes.

    Args:
        artifact: a graph, its folder, or an engine of TensorRT.
        folder: a tree as ``--onnx-dir`` has it, absolute; None to use the artifact in its place.
        asked: ``variant``, and the ``graph`` of an engine whose JSON does not tell its inputs.

    Raises:
        BadOption: there is no tree for an engine.
        UnfitArtifact, and what opening a graph raises.
    """
    if is_engine(artifact):
        return _plan_of_engine(artifact, folder, asked)
    opened = open_graph(artifact, _PROGRAM)
    contract, precision = fit_of(opened, _PROGRAM, asked.variant)
    engine = f"engine/transformer_{precision}_{fingerprint(opened)}.plan"
    engines = ("--custom-engine-paths", f"transformer:{engine}")
    notes = ("the other models are downloaded; TensorRT builds the transformer's engine at the first run",)
    if folder is None:
        path = require_plain(opened.path, _PROGRAM, ":,")
        words = ("--custom-onnx-paths", f"transformer:{path}", *engines)
        return Plan({}, _command(contract, precision, *words), _WHERE, contract.model, precision, notes)
    pipeline = "FluxKontextPipeline" if contract.variant == "kontext" else "FluxPipeline"
    inside = f"{pipeline}_{contract.model}/{_FOLDERS[precision]}"
    contents: dict[str, Content] = {f"{inside}/model_optimized.onnx": Copied(opened.path)}
    contents |= {f"{inside}/{name}": Linked(file, is_data=True) for name, file in data_of(opened).items()}
    command = _command(contract, precision, "--onnx-dir", require_plain(folder, _PROGRAM), *engines)
    return Plan(contents, command, _WHERE, contract.model, precision, notes)


def _plan_of_engine(path: Path, folder: Path | None, asked: Asked) -> Plan:
    engine = open_engine(path)
    if engine.backend != "tensorrt":
        raise UnfitArtifact(
            f"{path} is an engine of TensorRT for RTX, and {TITLES[_PROGRAM]} runs those of TensorRT: give the "
            "graph, of which it builds its own"
        )
    if folder is not None:
        raise BadOption(f"{path} is used in its place; leave out --output")
    contract = fitting(_PROGRAM, str(path), engine.signature(asked.graph), {}, asked.variant)
    extents = extents_in(str(path), engine.shapes, contract)
    precision = precision_of(str(path), engine.promised, _PROGRAM)
    words = ["--custom-engine-paths", f"transformer:{require_plain(path, _PROGRAM, ':,')}"]
    picture = picture_of(extents["L"][1], contract.sides)
    if picture is not None and contract.variant != "kontext":
        words += ["--height", str(picture[0]), "--width", str(picture[1])]
    if extents["B"][1] > 1:
        words += ["--batch-size", str(extents["B"][1])]
    notes = (f"the engine is taken by TensorRT {engine.version} alone; the other models are downloaded",)
    return Plan({}, _command(contract, precision, *words), _WHERE, contract.model, precision, notes)


def _command(contract: Contract, precision: str, *words: str) -> str:
    """Return the demo's command line.

    Without ``--download-onnx-models`` the demo refuses FP4, because of the other models.
    """
    given = _GIVEN.get(contract.variant)
    script = "demo_txt2img_flux.py" if given is None else "demo_img2img_flux.py"
    picture = () if given is None else (given, "PICTURE")
    return shell_line(
        "python3",
        script,
        PROMPT,
        "--version",
        contract.model,
        *picture,
        *_FLAGS[precision],
        "--download-onnx-models",
        "--hf-token",
        TOKEN,
        *words,
    )
