"""Packages for NVIDIA's demos and for Black Forest Labs' flux: trees, bytes, metadata, commands, refusals."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import fp4trt
from fp4trt.errors import BadOption, OutputExists, UnfitArtifact
from onnx_functions.graph.external_data import array_of, embedded, load_graph
from onnx_functions.simulation.simulate import runtime_session, simulate
from trt_build.graph import read_graph
from trt_build.manifest import graph_sha256

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL = "flux_transformer"

# demo/utils/path_manager.py of TensorRT-RTX: what the cache calls the files of a model
RTX_TREE = {
    "onnx": f"shared/onnx/{MODEL}/fp4/{MODEL}.onnx",
    "weights": f"shared/onnx/{MODEL}/fp4/{WEIGHTS}",
    "engine": f"shared/engines/{MODEL}/fp4/{MODEL}_%s.engine",
    "metadata": f"shared/engines/{MODEL}/fp4/{MODEL}_%s.metadata.json",
}
# demo/utils/engine_metadata.py, save_metadata
METADATA = {"model_name", "precision", "onnx_path", "input_shapes", "extra_args", "build_timestamp", "tensorrt_version"}
# demo_diffusion/path/resolve_path.py of TensorRT: ONNX_DIR/PIPELINE_VERSION/MODEL_QUANTIZATION
DIFFUSION_TREE = {"onnx": "FluxPipeline_flux.1-dev/transformer_fp4/model_optimized.onnx"}
# src/flux/util.py of Black Forest Labs, download_onnx_models_for_trt
BFL_TREE = {"onnx": "transformer.opt/fp4/model.onnx", "weights": "transformer.opt/fp4/backbone.onnx_data"}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def request(height: int, width: int, batch: int = 1) -> dict[str, tuple[int, ...]]:
    """The shapes that TensorRT-RTX's demo asks a cached engine for: get_input_profile with static shapes."""
    tokens = (height // 8 // 2) * (width // 8 // 2)
    return {
        "hidden_states": (batch, tokens, 64),
        "encoder_hidden_states": (batch, 512, 4096),
        "pooled_projections": (batch, 768),
        "timestep": (batch,),
        "img_ids": (tokens, 3),
        "txt_ids": (512, 3),
        "guidance": (batch,),
    }


def demo_takes(engine: Path, asked: Mapping[str, tuple[int, ...]], static: bool, version: str) -> bool:
    """Say what check_engine_compatibility of demo/utils/engine_metadata.py says: yes, or that it builds anew."""
    beside = engine.with_suffix(".metadata.json")
    if not (engine.exists() and beside.exists()):
        return False
    found = json.loads(beside.read_text())
    if found["tensorrt_version"] != version or ("_static." in str(engine)) != static or found["extra_args"]:
        return False
    saved = found["input_shapes"]
    if static:
        return {name: tuple(shape) for name, shape in saved.items()} == dict(asked)
    return all(
        name in saved
        and len(saved[name]) == 3
        and len(saved[name][0]) == len(shape)
        and all(low <= size <= high for low, size, high in zip(saved[name][0], shape, saved[name][2], strict=True))
        for name, shape in asked.items()
    )


def drawn(path: Path) -> np.ndarray:
    """What a graph answers in ONNX Runtime, on its own external data."""
    random = np.random.default_rng(0)
    shapes = {
        "hidden_states": (1, 16, 64),
        "encoder_hidden_states": (1, 8, 4096),
        "pooled_projections": (1, 768),
        "timestep": (1,),
        "img_ids": (16, 3),
        "txt_ids": (8, 3),
        "guidance": (1,),
    }
    inputs = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return runtime_session(simulate(load_graph(path)), path.parent, 1).run(None, inputs)[0]


def same_values(one: Path, other: Path) -> bool:
    """Whether two graphs have the same tensors, byte for byte, wherever these lie."""
    pairs = zip(load_graph(one).graph.initializer, load_graph(other).graph.initializer, strict=True)
    return all(
        a.name == b.name and array_of(a, one.parent).tobytes() == array_of(b, other.parent).tobytes() for a, b in pairs
    )


def test_the_demo_of_tensorrt_rtx_finds_graph_and_engine_in_its_cache(
    flux_dev: Path, engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tensorrt_rtx

    arguments = ["package", str(engines / "dynamic.engine"), "--graph", str(flux_dev), "--for", "rtx-demo"]
    assert fp4trt.run([*arguments, "-o", str(tmp_path / "cache"), "--link", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    tree = {name: path.replace("%s", "dynamic") for name, path in RTX_TREE.items()}
    assert files_in(tmp_path / "cache") == set(tree.values())
    assert {file["name"]: file["how"] for file in said["files"]} == {
        tree["onnx"]: "copied",
        tree["weights"]: "linked",
        tree["engine"]: "linked",
        tree["metadata"]: "written",
    }
    assert (said["model"], said["precision"], said["folder"]) == (MODEL, "fp4", str(tmp_path / "cache"))
    words = shlex.split(said["command"])
    assert words[:2] == ["python", "demo/flux1.dev/flux_demo.py"]
    assert words[words.index("--cache-dir") + 1] == str(tmp_path / "cache")
    assert words[words.index("--precision") + 1] == "fp4"
    assert words[words.index("--height") + 1] == words[words.index("--width") + 1] == "512"
    assert "--dynamic-shape" in words
    engine, version = tmp_path / "cache" / tree["engine"], tensorrt_rtx.__version__
    assert engine.samefile(engines / "dynamic.engine")
    assert json.loads((tmp_path / "cache" / tree["metadata"]).read_text()).keys() == METADATA
    for sizes, taken in (((512, 512), True), ((1024, 768, 4), True), ((256, 256), True), ((1040, 1024), False)):
        assert demo_takes(engine, request(*sizes), False, version) == taken
    assert not demo_takes(engine, request(512, 512, 5), False, version)
    assert not demo_takes(engine, request(512, 512), False, "1.8.0")
    assert drawn(tmp_path / "cache" / tree["onnx"]).tobytes() == drawn(flux_dev / "model.onnx").tobytes()


def test_a_static_engine_is_taken_for_its_own_sizes_alone(flux_dev: Path, engines: Path, tmp_path: Path) -> None:
    import tensorrt_rtx

    shutil.copytree(flux_dev, tmp_path / "flux")
    for name in ("static.engine", "static.json"):
        shutil.copy(engines / name, tmp_path / "flux")
    packaged = fp4trt.package(tmp_path / "flux" / "static.engine", tmp_path / "cache", program="rtx-demo")
    tree = {name: path.replace("%s", "static") for name, path in RTX_TREE.items()}
    assert files_in(tmp_path / "cache") == set(tree.values())
    assert {file["how"] for file in packaged.files} == {"copied", "written"}
    assert "--dynamic-shape" not in packaged.command
    engine = tmp_path / "cache" / tree["engine"]
    assert demo_takes(engine, request(512, 512), True, tensorrt_rtx.__version__)
    assert not demo_takes(engine, request(512, 528), True, tensorrt_rtx.__version__)
    onnx.checker.check_model(tmp_path / "cache" / tree["onnx"], full_check=True)
    assert (tmp_path / "cache" / tree["onnx"]).read_bytes() == (flux_dev / "model.onnx").read_bytes()


def test_demo_diffusion_takes_the_graph_in_its_place_or_in_a_tree_of_its_own(flux_dev: Path, tmp_path: Path) -> None:
    before = files_in(flux_dev)
    in_place = fp4trt.package(flux_dev, program="demo-diffusion")
    assert (in_place.folder, list(in_place.files)) == (None, [])
    assert files_in(flux_dev) == before
    words = shlex.split(in_place.command)
    assert words[1] == "demo_txt2img_flux.py"
    assert {"--fp4", "--download-onnx-models"} < set(words)
    assert words[words.index("--version") + 1] == in_place.model == "flux.1-dev"
    # dd_argparse.py, parse_key_value_pairs: MODEL:PATH, neither with a comma nor another colon
    name, path = words[words.index("--custom-onnx-paths") + 1].split(":")
    assert (name, Path(path)) == ("transformer", flux_dev / "model.onnx")
    assert words[words.index("--custom-engine-paths") + 1].split(":")[1].startswith("engine/transformer_fp4_")
    tree = fp4trt.package(flux_dev, tmp_path / "onnx", program="demo-diffusion")
    inside = tmp_path / "onnx" / DIFFUSION_TREE["onnx"]
    assert files_in(tmp_path / "onnx") == {DIFFUSION_TREE["onnx"], f"{Path(DIFFUSION_TREE['onnx']).parent}/{WEIGHTS}"}
    onnx.checker.check_model(inside, full_check=True)
    words = shlex.split(tree.command)
    assert words[words.index("--onnx-dir") + 1] == str(tmp_path / "onnx")
    kontext = fp4trt.package(flux_dev, tmp_path / "kontext", program="demo-diffusion", variant="kontext")
    assert "demo_img2img_flux.py" in kontext.command
    assert (tmp_path / "kontext" / "FluxKontextPipeline_flux.1-kontext-dev" / "transformer_fp4").is_dir()


def test_an_engine_of_tensorrt_is_named_to_demo_diffusion_and_one_of_tensorrt_for_rtx_refused(
    engines: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnfitArtifact, match="is an engine of TensorRT for RTX, and demoDiffusion runs those of Tens"):
        fp4trt.package(engines / "dynamic.engine", program="demo-diffusion")
    manifest = json.loads((engines / "dynamic.json").read_text())
    manifest["request"]["backend"] = "tensorrt"
    shutil.copy(engines / "dynamic.engine", tmp_path / "b200.engine")
    (tmp_path / "b200.json").write_text(json.dumps(manifest))
    words = shlex.split(fp4trt.package(tmp_path / "b200.engine", program="demo-diffusion").command)
    assert words[words.index("--custom-engine-paths") + 1] == f"transformer:{tmp_path / 'b200.engine'}"
    assert words[words.index("--height") + 1] == "512"
    with pytest.raises(UnfitArtifact, match=r"b200\.engine is an engine of tensorrt, and TensorRT-RTX's demo runs"):
        fp4trt.package(tmp_path / "b200.engine", tmp_path / "cache", program="rtx-demo")


def test_black_forest_labs_folder_has_one_data_file_under_their_name(flux_dev: Path, tmp_path: Path) -> None:
    packaged = fp4trt.package(flux_dev, tmp_path / "bfl", program="bfl")
    graph = tmp_path / "bfl" / BFL_TREE["onnx"]
    assert files_in(tmp_path / "bfl") == set(BFL_TREE.values())
    assert {file["name"]: file["how"] for file in packaged.files} == {
        BFL_TREE["onnx"]: "written",
        BFL_TREE["weights"]: "copied",
    }
    locations = {e.value for t in load_graph(graph).graph.initializer for e in t.external_data if e.key == "location"}
    assert locations == {"backbone.onnx_data"}
    assert same_values(graph, flux_dev / "model.onnx")
    assert drawn(graph).tobytes() == drawn(flux_dev / "model.onnx").tobytes()
    assert (
        "checkpoints/black-forest-labs_FLUX.1-dev-onnx && TRT_ENGINE_DIR=checkpoints/trt_engines_" in packaged.command
    )
    assert packaged.command.count("--trt_transformer_precision fp4") == 1


def test_external_data_of_several_files_become_one(flux_dev: Path, tmp_path: Path) -> None:
    """Every other tensor moves into a file of its own folder, behind an odd number of bytes."""
    source = tmp_path / "two"
    (source / "more").mkdir(parents=True)
    shutil.copy(flux_dev / WEIGHTS, source / "some.bin")
    model = load_graph(flux_dev / "model.onnx")
    moved = bytearray(b"odd")
    for index, tensor in enumerate(t for t in model.graph.initializer if t.external_data):
        entries = {entry.key: entry.value for entry in tensor.external_data} | {"location": "some.bin"}
        if index % 2:
            entries |= {"location": "more/data.bin", "offset": str(len(moved))}
            moved += array_of(tensor, flux_dev).tobytes()
        del tensor.external_data[:]
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    (source / "more" / "data.bin").write_bytes(moved)
    onnx.save(model, source / "model.onnx")
    packaged = fp4trt.package(source / "model.onnx", tmp_path / "bfl", program="bfl")
    assert {file["how"] for file in packaged.files} == {"copied", "written"}
    assert files_in(tmp_path / "bfl") == set(BFL_TREE.values())
    assert same_values(tmp_path / "bfl" / BFL_TREE["onnx"], flux_dev / "model.onnx")
    onnx.checker.check_model(tmp_path / "bfl" / BFL_TREE["onnx"], full_check=True)
    fp4trt.package(source / "model.onnx", tmp_path / "cache", program="rtx-demo")
    inside = (tmp_path / "cache" / RTX_TREE["onnx"]).parent
    assert files_in(inside) == {f"{MODEL}.onnx", "some.bin", "more/data.bin"}


def test_a_graph_that_holds_its_weights_has_a_data_file_too_that_nothing_is_downloaded_for(
    flux_dev: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    onnx.save(embedded(flux_dev / "model.onnx"), tmp_path / "whole" / "model.onnx")
    fp4trt.package(tmp_path / "whole", tmp_path / "bfl", program="bfl")
    assert files_in(tmp_path / "bfl") == set(BFL_TREE.values())
    assert (tmp_path / "bfl" / BFL_TREE["weights"]).stat().st_size == 0
    assert same_values(tmp_path / "bfl" / BFL_TREE["onnx"], flux_dev / "model.onnx")


Case = tuple[Callable[[Path, Path, Path], Mapping[str, Any]], type[Exception], str]


def _changed(engines: Path, tmp_path: Path) -> Path:
    shutil.copy(engines / "static.json", tmp_path)
    (tmp_path / "static.engine").write_bytes((engines / "static.engine").read_bytes()[:-1] + b"\1")
    return tmp_path / "static.engine"


def _for(program: str, artifact: str = "flux", **more: Any) -> Callable[[Path, Path, Path], Mapping[str, Any]]:
    return lambda flux, engines, tmp: (
        {"artifact": {"flux": flux}.get(artifact, engines / artifact), "program": program} | more
    )


def _alone(engines: Path, folder: Path) -> Path:
    """Return a copy of an engine without its JSON."""
    return Path(shutil.copyfile(engines / "static.engine", folder / "static.engine"))


REFUSED: dict[str, Case] = {
    "an engine for Black Forest Labs": (_for("bfl", "static.engine"), UnfitArtifact, "is an engine, and Black Forest"),
    "an engine without its graph": (
        _for("rtx-demo", "static.engine"),
        UnfitArtifact,
        "has no model.onnx beside it; name the graph that it was built from with --graph",
    ),
    "an engine without its JSON": (
        lambda flux, engines, tmp: {"artifact": _alone(engines, tmp), "program": "rtx-demo", "graph": flux},
        UnfitArtifact,
        "static.engine has no static.json of fp4trt build beside it; expected an engine with its JSON",
    ),
    "an engine that has changed": (
        lambda flux, engines, tmp: {"artifact": _changed(engines, tmp), "program": "rtx-demo", "graph": flux},
        UnfitArtifact,
        "is not the engine that static.json describes; build it again",
    ),
    "a file that is no graph": (
        _for("bfl", "static.json"),
        UnfitArtifact,
        "is no graph, which Black Forest Labs' flux",
    ),
    "an option of another program": (_for("bfl", graph="x"), BadOption, "graph is not for bfl; leave it out"),
    "a graph to a graph": (_for("rtx-demo", graph="x"), BadOption, "is no engine with its JSON; leave it out"),
    "a model that the demo has not": (_for("rtx-demo", variant="canny"), BadOption, "has no model 'canny'; expected"),
    "a space in the path": (_for("rtx-demo", output="a cache"), UnfitArtifact, "has ' ' in its path, which Tensor"),
    "the artifact's own folder": (
        lambda flux, engines, tmp: {"artifact": flux, "program": "bfl", "output": flux, "force": True},
        OutputExists,
        "is where flux-fp4 lies; choose another --output",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_program_cannot_take_is_refused_before_anything_is_written(
    what: str, flux_dev: Path, engines: Path, tmp_path: Path
) -> None:
    case, error, words = REFUSED[what]
    given = dict(case(flux_dev, engines, tmp_path))
    before = files_in(tmp_path), files_in(flux_dev)
    output = tmp_path / given.pop("output", "out")
    with pytest.raises(error) as refused:
        fp4trt.package(given.pop("artifact"), output, **given)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert (files_in(tmp_path), files_in(flux_dev)) == before


@pytest.mark.parametrize("program", ["rtx-demo", "demo-diffusion", "bfl"])
def test_another_model_is_refused_by_its_first_difference(
    program: str, quantized_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert fp4trt.run(["package", str(quantized_digits), "--for", program, "-o", str(output)]) == 2
    said = capsys.readouterr()
    assert "its input hidden_states takes 16 on axis 2, expected 64; give the graph of such a model" in said.err
    assert (said.out, list(tmp_path.iterdir())) == ("", [])


def test_an_engine_of_other_sizes_is_refused(flux_dev: Path, engines: Path, tmp_path: Path) -> None:
    shutil.copy(engines / "static.engine", tmp_path / "x.engine")
    manifest = json.loads((engines / "static.json").read_text())

    def refused(**sizes: Sequence[int]) -> str:
        for name in ("encoder_hidden_states", "hidden_states", "txt_ids", "img_ids"):
            axis = 0 if name.endswith("ids") else 1
            symbol = "T" if name in ("encoder_hidden_states", "txt_ids") else "L"
            for shape, size in zip(manifest["request"]["profile"][name], sizes.get(symbol, ()), strict=False):
                shape[axis] = size
        (tmp_path / "x.json").write_text(json.dumps(manifest))
        with pytest.raises(UnfitArtifact) as error:
            fp4trt.package(tmp_path / "x.engine", tmp_path / "cache", program="rtx-demo", graph=flux_dev)
        return str(error.value)

    assert "is for 256 text tokens where TensorRT-RTX's demo gives 512: build it with another" in refused(T=(256,) * 3)
    assert "is for 64 image tokens where" in refused(T=(512,) * 3, L=(64,) * 3)
    assert "is for 257 image tokens, which no picture of 256 to 1024 pixels has" in refused(L=(257,) * 3)
    dynamic = refused(L=(256, 7225, 7225))
    assert "is for 256 to 7225 image tokens, 7225 at best, where TensorRT-RTX's demo gives 256 to 4096" in dynamic


def test_a_package_is_replaced_with_force_alone_and_nothing_of_the_user_s(
    flux_dev: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["package", str(flux_dev), "--for", "bfl", "-o", str(tmp_path / "bfl")]
    assert fp4trt.run(arguments) == 0
    out = capsys.readouterr().out
    assert "bfl takes it as flux-dev (fp4): 2 files (1 written, 1 copied)" in out
    assert "run in a clone of black-forest-labs/flux:\nmkdir -p checkpoints && ln -sT " in out
    with pytest.raises(OutputExists, match="replace it with --force"):
        fp4trt.package(flux_dev, tmp_path / "bfl", program="bfl")
    fp4trt.package(flux_dev, tmp_path / "bfl", program="bfl", force=True)
    (tmp_path / "bfl" / "t5.opt").mkdir()
    (tmp_path / "bfl" / "t5.opt" / "model.onnx").touch()
    with pytest.raises(OutputExists, match=r"holds t5\.opt/model\.onnx, which fp4trt did not write"):
        fp4trt.package(flux_dev, tmp_path / "bfl", program="bfl", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"bfl"}
    assert graph_sha256(read_graph(tmp_path / "bfl" / BFL_TREE["onnx"]))


def test_a_disk_that_refuses_leaves_nothing(flux_dev: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, most))  # the graph fits, its weights do not
    try:
        with pytest.raises(OSError, match=r"File too large: .*backbone\.onnx_data"):
            fp4trt.package(flux_dev, tmp_path / "bfl", program="bfl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_linked_to_is_copied(flux_dev: Path) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == flux_dev.stat().st_dev:
        pytest.skip("needs a second file system")
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        packaged = fp4trt.package(flux_dev, Path(folder) / "bfl", program="bfl", link=True)
        assert {file["name"]: file["how"] for file in packaged.files}[BFL_TREE["weights"]] == "copied"
        assert not any("second name" in note for note in packaged.notes)
        onnx.checker.check_model(Path(folder) / "bfl" / BFL_TREE["onnx"])
