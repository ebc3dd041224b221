"""Training of low-rank branches and biases: what learns, what stays, and that the checkpoint is the student."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp4trt
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import BRANCH, SMOOTHING, WEIGHTS, Checkpoint, load, read
from calibration.formats import nvfp4
from calibration.inputs.captured import Inputs, load_inputs
from calibration.methods.qat import distillation
from calibration.methods.qat.branch import branch_linears
from calibration.methods.qat.student import make_student, student_linears
from calibration.quantization import quantize
from exporter.onnx_export import branches, group_leaders
from fp4trt.account import account_of
from fp4trt.errors import BadCheckpoint
from tests import warm_python

GROUP = [f"transformer_blocks.0.attn.to_{one}" for one in "qkv"]
START = """
name: small-branches
method: {name: quality, rank: 4, shift_fold: false, smooth_fold: false, gptq: false, descent_sweeps: 0, wiener: 0,
         bias_correction: false, sequential: false}
"""
RECIPE = """
name: branch
method: {name: qat, start: %s, learn: %s, steps: 6, learning_rate: 0.0001, batch: 16, warm_up: 1}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "start.yaml").write_text(START)
    (folder / "branch.yaml").write_text(RECIPE % (json.dumps(str(folder / "start.yaml")), "branch"))
    return folder / "branch.yaml"


@pytest.fixture(scope="module")
def trained(
    digits: Path, recipe: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module]:
    """A checkpoint whose branches were trained for some steps, and the student that it is of."""
    folder, students = tmp_path_factory.mktemp("trained"), []
    with pytest.MonkeyPatch.context() as patch:
        real = distillation.train
        patch.setattr(distillation, "train", lambda student, *rest: students.append(student) or real(student, *rest))
        quantize(digits, folder / "branch", recipe=recipe, calibration=five_calls)
    return folder / "branch", students[0].eval()


@pytest.fixture(scope="module")
def start(digits: Path, recipe: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("start") / "start"
    quantize(digits, folder, recipe=recipe.with_name("start.yaml"), calibration=five_calls)
    return read(folder)


def _answer(model: nn.Module, call: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value.float() for name, value in call.items()}, return_dict=False)[0]


def _student(checkpoint: Checkpoint) -> nn.Module:
    return make_student(checkpoint, lambda name: pytest.fail(f"{name} of the plain model is not needed"), "branch")


def test_the_student_begins_as_what_it_starts_from_and_factors_and_biases_alone_learn(svdquant_checkpoint, five_calls):
    checkpoint, call = read(svdquant_checkpoint), load_inputs(five_calls)[1]
    assert checkpoint.is_smoothed(GROUP[0])
    student = _student(checkpoint)
    assert torch.equal(_answer(student, call), _answer(load(svdquant_checkpoint, dtype=torch.float32), call))
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    paths = [path for path, _ in student_linears(student)]
    assert len(paths) == 20
    shared = {f"{path}.{BRANCH[0]}" for path in GROUP[1:]}
    assert {f"{path}.{leaf}" for path in paths for leaf in ("bias", BRANCH[1])} < learning
    assert {name for name in learning if name.endswith(BRANCH[0])}.isdisjoint(shared)
    assert len({id(student.get_submodule(path).svdquant_lora_a) for path in GROUP}) == 1
    learned = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    codes = sum(2 * linear.codes.numel() for _, linear in student_linears(student))
    assert learned < 0.2 * codes
    assert not any(parameter.numel() == 128 * 512 for parameter in student.parameters())


@pytest.mark.parametrize("smoothed", [True, False])
def test_gradients_are_those_of_the_plain_products(svdquant_checkpoint, smoothed):
    path = "transformer_blocks.0.attn.to_k"
    linear = branch_linears(read(svdquant_checkpoint))[path]
    if not smoothed:
        linear.pre_quant_scale = None
    with torch.no_grad():  # masters that BF16 does not hold
        for parameter in linear.parameters():
            parameter.mul_(1.001)
    given = torch.randn(2, 3, linear.svdquant_lora_a.shape[1], generator=torch.Generator().manual_seed(0))
    given.requires_grad_()
    output = linear(given)
    output.square().sum().backward()
    masters = [linear.bias, linear.svdquant_lora_a, linear.svdquant_lora_b]
    plain = [given.detach().clone(), *(value.detach().bfloat16().float() for value in masters)]
    for value in plain:
        value.requires_grad_()
    x, bias, a, b = plain
    x = x * linear.pre_quant_scale if smoothed else x
    rounded = nvfp4.fake_quantize(x, linear.input_scale)
    expected = nn.functional.linear(rounded, linear.weight(), bias) + (x @ a.T) @ b.T
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    for ours, theirs in zip((given, *masters), plain, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_no_gradient_needs_a_weight_in_memory(svdquant_checkpoint):
    """Between the passes the graph holds activations and factors, nothing of the size of a weight."""
    linear = branch_linears(read(svdquant_checkpoint))["transformer_blocks.0.ff.net.2"]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value.numel()) or value, lambda kept: kept):
        linear(torch.randn(1, 1, linear.codes.shape[1] * 2, requires_grad=True))
    assert 0 < max(kept) <= max(linear.svdquant_lora_a.numel(), linear.svdquant_lora_b.numel())


def test_factors_and_biases_change_and_codes_and_scales_stay(trained, start):
    after = read(trained[0])
    assert after.tensors.keys() == start.tensors.keys()
    changed = {name for name in after.tensors if after.raw(name).tobytes() != start.raw(name).tobytes()}
    leaves = {name.rpartition(".")[2] for name in changed}
    assert leaves == {"bias", *BRANCH}
    assert {path.rpartition(".")[0] for path in changed} == set(after.quantized)
    assert {after.tensors[name].dtype for name in changed} == {"BF16"}
    assert len({after.raw(f"{path}.{BRANCH[0]}").tobytes() for path in GROUP}) == 1
    for key in ("amax", "groups", "quantized"):
        assert after.manifest[key] == start.manifest[key]
    assert after.manifest["training"]["start"]["name"] == "small-branches"


def test_the_graph_is_made_of_what_that_of_the_start_is(trained, start):
    after = read(trained[0])
    for made_of in (branches, group_leaders, lambda checkpoint: checkpoint.account.linears):
        assert made_of(after) == made_of(start)
    assert {branch.factor for branch in branches(after).values()} < set(after.quantized)
    for name, tensor in after.tensors.items():
        assert (tensor.dtype, tensor.shape) == (start.tensors[name].dtype, start.tensors[name].shape), name


def test_a_trained_checkpoint_that_lost_its_smoothing_is_refused(svdquant_checkpoint):
    checkpoint = read(svdquant_checkpoint)
    begun = checkpoint.manifest["recipe"]
    manifest = {**checkpoint.manifest, "recipe": {"method": {"name": "qat"}}, "training": {"start": begun}}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(SMOOTHING)}
    account_of("here", checkpoint.config, {}, checkpoint.tensors, None, manifest)
    with pytest.raises(BadCheckpoint, match=rf"here lacks .*\.{SMOOTHING}; SVDQuant made the linear"):
        account_of("here", checkpoint.config, {}, tensors, None, manifest)


def test_the_checkpoint_computes_what_the_student_does_and_is_nearer_to_the_teacher(trained, start, digits, five_calls):
    folder, student = trained
    after, before = (load(one, dtype=torch.float32) for one in (folder, start.directory))
    teacher = load_source(digits, torch.float32)
    errors = []
    for call in load_inputs(five_calls)[::2]:
        answer, wanted = _answer(after, call), _answer(teacher, call)
        assert torch.equal(answer, _answer(student, call))
        errors.append([float((one - wanted).square().mean()) for one in (answer, _answer(before, call))])
    ours, theirs = (sum(column) for column in zip(*errors, strict=True))
    assert ours < theirs


_KILLED = """
import os, signal, sys
from calibration.methods.qat import training
import fp4trt

training._REST_S = training._SHARE = 0
keep = training._Loop._keep


def keep_and_die(self, done):
    keep(self, done)
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)


training._Loop._keep = keep_and_die
sys.exit(fp4trt.run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.slow
def test_a_killed_training_goes_on_with_its_shared_factors_and_ends_with_the_same_bytes(
    digits: Path, recipe: Path, trained, five_calls, tmp_path, capfd
):
    command = ["quantize", str(digits), "-o", str(tmp_path / "branch"), "--recipe", str(recipe)]
    command += ["--calibration", str(five_calls)]
    status, printed = warm_python.run(_KILLED, *command)
    assert status == -9, printed
    assert "shared tensor" not in printed
    assert fp4trt.run(command) == 0
    assert "resuming: 3 of 6 steps are done" in capfd.readouterr().err
    for name in (WEIGHTS, "fp4trt.json", "training/loss.json"):
        assert (tmp_path / "branch" / name).read_bytes() == (trained[0] / name).read_bytes(), name


@pytest.mark.parametrize(
    ("first", "learn", "said"),
    [
        (
            "nvfp4-quality",
            "branch",
            "branch trains low-rank branches (learn: branch), and its start nvfp4-quality make",
        ),
        ("nvfp4-modelopt-awq", "branch", "its start nvfp4-modelopt-awq makes none; expected one like nvfp4-quality-r8"),
        (
            "nvfp4-quality-r8",
            "all",
            "branch starts from nvfp4-quality-r8, whose linears have a low-rank branch, and le",
        ),
        ("svdquant-r8", "biases", "learn: biases trains those without; expected learn: branch, or a start like nvfp4-"),
    ],
)
def test_a_start_and_what_learns_have_to_fit(digits: Path, tmp_path, capfd, first, learn, said):
    (tmp_path / "recipe.yaml").write_text(RECIPE % (first, learn))
    command = ["quantize", str(digits), "-o", str(tmp_path / "branch"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert fp4trt.run(command) == 2
    assert said in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("options", "formats", "said"),
    [
        ("rank: 8, ranks: [{linears: '*', rank: 0}]", "{}", "makes none for the linears in NVFP4: its ranks are 0"),
        ("rank: 8", "{default: fp8}", "the formats of branch leave no linear in nvfp4"),
    ],
)
def test_a_start_that_leaves_no_branch_is_refused_before_it_is_made(
    digits: Path, tmp_path, capfd, options, formats, said
):
    (tmp_path / "first.yaml").write_text(f"name: first\nmethod: {{name: quality, {options}}}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE % (tmp_path / "first.yaml", "branch") + f"formats: {formats}\n")
    command = ["quantize", str(digits), "-o", str(tmp_path / "branch"), "--recipe", str(tmp_path / "recipe.yaml")]
    assert fp4trt.run(command) == 2
    error = capfd.readouterr().err
    assert said in error
    assert "quantizing" not in error
