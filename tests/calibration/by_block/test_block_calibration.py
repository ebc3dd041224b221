"""Calibration block by block: the same amax values as the whole model's, whatever happens in between."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from calibration.by_block import calibration as by_blocks
from calibration.by_block.calibration import METADATA, calibrate, calibration_from, merged
from calibration.by_block.measure_amax import measured_by_block
from calibration.by_block.progress import STATE, finished_blocks
from calibration.by_block.runner import BlockRunner, Outputs
from calibration.checkpoints.plain import empty_source, load_source
from calibration.formats import input_quantizers
from calibration.formats.attention_amax import OperandAmax, operands_of
from calibration.inputs.captured import Inputs, load_inputs, save_inputs
from fp4trt.errors import BadAmax, BadCheckpoint, BadInputs, OutputExists
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import tensors_in_file
from tests import warm_python

ROOT = Path(__file__).parents[3]

MakeFlux = Callable[..., Path]


@pytest.fixture(scope="module")
def inputs(quantized_digits: Path) -> Path:
    return quantized_digits / "calibration" / "inputs.safetensors"


@pytest.fixture(scope="module")
def paths(digits: Path) -> tuple[str, ...]:
    config = load_json(digits / "config.json")
    return family_of(config).quantized(config)


@pytest.fixture(scope="module")
def attentions(digits: Path) -> tuple[str, ...]:
    config = load_json(digits / "config.json")
    return family_of(config).attentions(config)


@pytest.mark.slow
def test_the_maxima_are_those_that_modelopt_measures_on_the_whole_model_bit_for_bit(
    digits: Path, inputs: Path, paths: tuple[str, ...], attentions: tuple[str, ...], tmp_path: Path
) -> None:
    calls, model = load_inputs(inputs)[::20], load_source(digits)
    with OperandAmax(attentions) as operands:
        whole = input_quantizers.measure_input_amax(model, paths, lambda: [model(**call) for call in calls] and None)
    whole |= operands.amax
    with measured_by_block(digits, calls, tmp_path / "work") as by_block:
        assert by_block == whole
    assert len(set(whole.values())) > 10
    assert not (tmp_path / "work").exists()


def test_the_maxima_of_attentions_are_those_that_modelopt_measures(
    digits: Path, inputs: Path, attentions: tuple[str, ...], tmp_path: Path
) -> None:
    from calibration.formats.modelopt_backend import mtq

    calls, model = load_inputs(inputs)[::20], load_source(digits)
    with measured_by_block(digits, calls, tmp_path / "work") as by_block:
        measured = {operand: by_block[operand] for operand in operands_of(attentions)}
    entries = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": f"*.{name}_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}} for name in "qkv"
    ]
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, lambda net: [net(**call) for call in calls])
    assert measured == {name: float(model.get_submodule(f"{name}_bmm_quantizer").amax) for name in measured}


def test_a_run_by_block_gives_the_models_own_output_and_holds_one_block(digits: Path, inputs: Path) -> None:
    config = load_json(digits / "config.json")
    blocks, call = family_of(config).blocks(config), load_inputs(inputs)[0]
    model, stored = empty_source(digits)
    runner = BlockRunner(model, blocks, lambda name: stored[name].tensor())
    outputs: Outputs = ()
    with torch.no_grad():
        for block in blocks:
            with runner.loaded(block):
                outputs = runner.run(block, call, outputs)
                there = {path for path in blocks if not model.get_submodule(path).attn.to_q.weight.is_meta}
                assert there == {block}
        (found,) = runner.finish(call, outputs)
        assert torch.equal(found, load_source(digits)(**call, return_dict=False)[0])


def test_a_run_from_a_block_on_gives_the_models_own_output(digits: Path, inputs: Path) -> None:
    config = load_json(digits / "config.json")
    blocks, call = family_of(config).blocks(config), load_inputs(inputs)[0]
    model, stored = empty_source(digits)
    runner = BlockRunner(model, blocks, lambda name: stored[name].tensor())
    with contextlib.ExitStack() as stack, torch.no_grad():
        for block in blocks:
            stack.enter_context(runner.loaded(block))
        wanted, outputs = load_source(digits)(**call, return_dict=False)[0], ()
        for block in blocks:
            assert torch.equal(runner.finish(call, outputs, block)[0], wanted)
            outputs = runner.run(block, call, outputs)


def test_each_weight_is_read_once_whatever_the_number_of_calls(
    digits: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.checkpoints import plain

    read: list[str] = []
    finite = plain.finite_tensor
    monkeypatch.setattr(plain, "finite_tensor", lambda *of: read.append(of[1]) or finite(*of))
    with measured_by_block(digits, load_inputs(inputs)[:3], tmp_path / "work"):
        pass
    assert sorted(read) == sorted(tensors_in_file(digits / "diffusion_pytorch_model.safetensors"))


@pytest.mark.slow
def test_a_killed_calibration_goes_on_with_the_next_block_and_gives_the_same_bytes(
    digits: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_after: Callable[..., None]
) -> None:
    few = tmp_path / "few.safetensors"
    save_inputs(few, load_inputs(inputs)[:6])
    calibrate(digits, tmp_path / "whole.json", inputs=few)
    output = tmp_path / "amax.json"
    kill_after(1, "calibrate", digits, "-o", output, "--inputs", few)
    assert not output.exists()
    ran: list[str] = []
    run = BlockRunner.run
    monkeypatch.setattr(BlockRunner, "run", lambda self, block, *rest: ran.append(block) or run(self, block, *rest))
    calibrate(digits, output, inputs=few)
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert list(dict.fromkeys(ran)) == ["single_transformer_blocks.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amax.json", "few.safetensors", "whole.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.slow
def test_a_calibration_killed_at_any_moment_gives_the_same_bytes_when_it_is_run_again(
    built_in: Path, inputs: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.safetensors"
    save_inputs(few, [*load_inputs(inputs)] * 3)
    calibrate(built_in, tmp_path / "whole.json", inputs=few)
    command = ["calibrate", str(built_in), "-o", tmp_path / "amax.json", "--inputs", few]
    with warm_python.started(warm_python.FP4TRT, *command) as process:
        process.wait((tmp_path / "amax.json.partial").exists)
        time.sleep(0.4)
    assert process.status == -9
    calibrate(built_in, tmp_path / "amax.json", inputs=few, force=True)
    assert (tmp_path / "amax.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


@pytest.mark.slow
def test_what_a_killed_run_left_is_not_used_for_other_inputs(
    digits: Path, inputs: Path, tmp_path: Path, kill_after: Callable[..., None]
) -> None:
    for name, calls in (("first", slice(0, 3)), ("other", slice(3, 6))):
        save_inputs(tmp_path / name, load_inputs(inputs)[calls])
    output = tmp_path / "amax.json"
    kill_after(1, "calibrate", digits, "-o", output, "--inputs", tmp_path / "first")
    calibrate(digits, output, inputs=tmp_path / "other")
    calibrate(digits, tmp_path / "whole.json", inputs=tmp_path / "other")
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_checkpoint_whose_outputs_are_cut_short_starts_again(tmp_path: Path) -> None:
    run = {"model": "x"}
    with finished_blocks(tmp_path / "work", run) as finished:
        for block in ("a", "b"):
            finished.add((torch.ones(3, dtype=torch.bfloat16), torch.zeros(2, 2)))
            finished.finish(block, {"n": 1.0})
        assert [value.tolist() for value in finished.outputs(0)] == [[1, 1, 1], [[0, 0], [0, 0]]]
        shutil.copytree(tmp_path / "work", tmp_path / "kept")
    assert not (tmp_path / "work").exists()
    outputs = tmp_path / "kept" / "002.outputs"
    outputs.write_bytes(outputs.read_bytes()[:-1])
    with finished_blocks(tmp_path / "kept", run) as finished:
        assert finished.results == {}
        assert finished.outputs(0) == ()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_was_measured_stays_until_something_was_made_of_it(
    error: BaseException, digits: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, work = load_inputs(inputs)[:3], tmp_path / "work"
    with pytest.raises(type(error)), measured_by_block(digits, calls, work) as first:
        raise error
    assert [path.name for path in work.iterdir()] == [STATE]
    monkeypatch.delattr(BlockRunner, "run")
    with measured_by_block(digits, calls, work) as again:
        assert again == first
    assert not work.exists()


def test_inputs_that_cannot_be_saved_are_noticed_before_anything_is_run(
    digits: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str | Path, _: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(by_blocks, "save_inputs", full)
    monkeypatch.delattr(BlockRunner, "run")
    with pytest.raises(OSError, match="No space"):
        calibrate(digits, tmp_path / "amax.json", inputs=inputs, save_inputs_to=tmp_path / "saved.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_users_is_not_taken_for_a_killed_runs(digits: Path, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "amax.json.partial").mkdir()
    (tmp_path / "amax.json.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"amax\.json\.partial is in the way"):
        calibrate(digits, tmp_path / "amax.json", inputs=inputs)
    assert (tmp_path / "amax.json.partial" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("module", ["transformer_blocks.0.attn.to_q", "x_embedder"])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_left(
    module: str, tiny_flux: MakeFlux, tmp_path: Path
) -> None:
    source = tiny_flux(tmp_path / "flux")
    config = load_json(source / "config.json")
    calls = [family_of(config).example_inputs(config, (1, 16, 8), 0, torch.bfloat16)]
    weights = source / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    stored = tensors_in_file(weights)[f"{module}.weight"]
    content[stored.offset : stored.offset + 2] = b"\xc0\x7f"
    weights.write_bytes(content)
    save_inputs(tmp_path / "inputs", calls)
    with pytest.raises(BadCheckpoint, match=rf"{module}\.weight holds NaN"):
        calibrate(source, tmp_path / "amax.json", inputs=tmp_path / "inputs")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flux", "inputs"]


def test_cuda_is_refused_where_there_is_none(
    digits: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInputs, match="--device cuda"):
        calibrate(digits, tmp_path / "amax.json", inputs=inputs, device="cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_maxima_are_nearly_those_of_the_cpu(digits: Path, inputs: Path, tmp_path: Path) -> None:
    calls: Sequence[Inputs] = load_inputs(inputs)[:3]
    with measured_by_block(digits, calls, tmp_path / "work") as on_cpu:
        pass
    with measured_by_block(digits, calls, tmp_path / "work", "cuda") as on_gpu:
        assert on_gpu == pytest.approx(on_cpu, rel=0.05)


def _write_amax(path: Path, values: dict[str, object]) -> Path:
    path.write_text(json.dumps({METADATA: {"data": path.stem}, **values}))
    return path


def test_merged_files_give_each_linear_its_largest_maximum_and_name_their_sources(
    digits: Path, paths: tuple[str, ...], tmp_path: Path
) -> None:
    one = _write_amax(tmp_path / "one.json", {paths[0]: 3.0, **dict.fromkeys(paths[1:9], 1.0)})
    two = _write_amax(tmp_path / "two.json", {paths[0]: 2.0, **dict.fromkeys(paths[1:], 4.0)})
    with calibration_from(digits, [one, two], tmp_path / "work") as found:
        pass
    assert found.amax == {paths[0]: 3.0, **dict.fromkeys(paths[1:], 4.0)}
    assert list(found.amax) == list(paths)
    assert [source["described"]["data"] for source in found.described["merged"]] == ["one", "two"]
    with calibration_from(digits, (two, one), tmp_path / "work") as turned:
        assert found.amax == turned.amax


def test_one_file_in_a_list_is_that_file(digits: Path, paths: tuple[str, ...], tmp_path: Path) -> None:
    file = _write_amax(tmp_path / "one.json", dict.fromkeys(paths, 1.0))
    work = tmp_path / "work"
    with calibration_from(digits, [file], work) as listed, calibration_from(digits, file, work) as alone:
        assert listed == alone


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None, "1"])
def test_a_number_that_is_no_maximum_is_refused_though_another_file_has_a_larger_one(
    value: object, paths: tuple[str, ...], tmp_path: Path
) -> None:
    good = _write_amax(tmp_path / "good.json", dict.fromkeys(paths, 9.0))
    bad = _write_amax(tmp_path / "bad.json", {paths[3]: value})
    with pytest.raises(BadAmax, match=paths[3].replace(".", r"\.")):
        merged([good, bad], paths)


@pytest.mark.parametrize("value", [1e300, 1e-300, 1e-36, 10**400])
def test_a_maximum_that_gives_no_scale_says_so(value: float, paths: tuple[str, ...], tmp_path: Path) -> None:
    file = _write_amax(tmp_path / "amax.json", {**dict.fromkeys(paths, 9.0), paths[3]: value})
    with pytest.raises(BadAmax, match=r"beyond FP32's range or gives a scale.*expected 3\.16e-35 to 3\.4e\+38") as told:
        merged([file], paths)
    assert len(str(told.value)) < 400


def test_merged_files_must_be_maxima_of_this_model_and_cover_it(paths: tuple[str, ...], tmp_path: Path) -> None:
    part = _write_amax(tmp_path / "part.json", dict.fromkeys(paths[:5], 1.0))
    with pytest.raises(BadAmax, match=f"no amax for the input of {paths[5]}"):
        merged([part, part], paths)
    with pytest.raises(BadAmax, match=r"foo\.bar"):
        merged([part, _write_amax(tmp_path / "other.json", {"foo.bar": 1.0})], paths)
    with pytest.raises(BadAmax, match="does not exist"):
        merged([part, tmp_path / "absent.json"], paths)
    with pytest.raises(BadAmax, match="is a folder; expected amax values"):
        merged([part, tmp_path], paths)


def test_captured_inputs_are_read_one_call_at_a_time(inputs: Path, tmp_path: Path) -> None:
    calls = load_inputs(inputs)
    assert calls[2] is not calls[2]
    save_inputs(tmp_path / "again.safetensors", calls)
    assert (tmp_path / "again.safetensors").read_bytes() == inputs.read_bytes()
    assert STATE not in {path.name for path in inputs.parent.iterdir()}
