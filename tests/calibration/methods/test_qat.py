"""Quantization-aware training: the student, what it is asked, the loop, and the checkpoint that comes of it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fp4trt
from calibration.by_block import processes
from calibration.checkpoints.quantized import WEIGHTS, load, read
from calibration.digits.model import load_transformer
from calibration.digits.sampling import capture
from calibration.formats.linears import QuantizedLinear
from calibration.inputs.captured import load_inputs, save_inputs
from calibration.methods.qat import distillation
from calibration.methods.qat.student import StudentLinear, make_student, student_linears, student_tensors
from calibration.methods.qat.training import learning_rate, train
from calibration.methods.qat.trajectories import Trajectories
from calibration.quantization import quantize
from calibration.recipes.recipe import QAT, Learn
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadInputs, BadRecipe
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from generation.comparison.digits import compare
from tests import warm_python
from tests.frame.diffusers_models import MODELS

ROOT = Path(fp4trt.__file__).parents[1]
RECIPE = """
name: short
method: {name: qat, start: nvfp4-ptq, steps: %d, learning_rate: 0.0002, batch: %d, warm_up: 2}
"""


@pytest.fixture(scope="module")
def start(digits: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "ptq"
    quantize(digits, folder, recipe="nvfp4-ptq", calibration=five_calls)
    return folder


@pytest.fixture(scope="module")
def calls(digits: Path) -> list[dict[str, torch.Tensor]]:
    return capture(load_transformer(dtype=torch.bfloat16), seeds=(0,), steps=4, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def trained(digits: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A checkpoint that was trained for some steps, and the student that it is of."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "short.yaml").write_text(RECIPE % (12, 20))
    students = []
    with pytest.MonkeyPatch.context() as patch:
        real = distillation.train
        patch.setattr(distillation, "train", lambda student, *rest: students.append(student) or real(student, *rest))
        quantize(digits, folder / "qat", recipe=folder / "short.yaml", calibration=five_calls)
    return folder / "qat", students[0].eval()


def of_digits(digits: Path, start: Path, learn: Learn = "all") -> nn.Module:
    stored = tensors_in_folder(digits)
    return make_student(read(start), lambda name: stored[name].tensor(), learn)


def answer(model: nn.Module, call: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{name: value.float() for name, value in call.items()}, return_dict=False)[0]


def test_the_student_begins_as_exactly_what_it_starts_from(digits, start, calls):
    student = of_digits(digits, start)
    assert torch.equal(answer(student, calls[1]), answer(load(start, torch.float32), calls[1]))
    learning = dict(student_linears(student))
    assert len(learning) == 20
    stored = tensors_in_folder(digits)
    for path, linear in learning.items():
        assert torch.equal(linear.weight.detach(), stored[f"{path}.weight"].tensor().float()), path


def test_a_code_that_a_method_chose_otherwise_is_kept(digits, start):
    path = "transformer_blocks.0.ff.net.2"
    checkpoint = read(start)
    stored = tensors_in_folder(digits)
    other = -stored[f"{path}.weight"].tensor()
    student = make_student(
        checkpoint, lambda name: other if name == f"{path}.weight" else stored[name].tensor()
    ).get_submodule(path)
    assert torch.equal(student.rounded(student.weight.detach()), checkpoint.weight(path))


def test_the_gradient_goes_straight_through_every_rounding(start):
    random = torch.Generator().manual_seed(0)
    path, checkpoint = "transformer_blocks.0.ff.net.2", read(start)
    scales = [checkpoint.tensor(f"{path}.{name}") for name in ("weight_scale", "weight_scale_2", "input_scale")]
    bias = checkpoint.tensor(f"{path}.bias").float() * 1.001
    linear = StudentLinear(checkpoint.weight(path), bias, *scales)
    given = torch.randn(3, linear.weight.shape[1], generator=random).requires_grad_()
    output = linear(given)
    output.square().sum().backward()
    from calibration.formats import nvfp4

    plain = [
        linear.rounded(linear.weight.detach()), linear.bias.detach().bfloat16().float(),
        nvfp4.fake_quantize(given.detach(), scales[2]),
    ]  # fmt: skip
    for value in plain:
        value.requires_grad_()
    expected = nn.functional.linear(plain[2], plain[0], plain[1])
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    for ours, theirs in zip((linear.weight, linear.bias, given), plain, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_linear_that_stays_as_it_is_lets_the_gradient_through(kind):
    linear = QuantizedLinear(32, 8, bias=True, format=kind).requires_grad_(False)
    linear.input_scale.fill_(0.01)
    given = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = linear(given)
    assert torch.equal(output, linear(given.detach()))
    output.sum().backward()
    assert torch.equal(given.grad, linear.weight.sum(0).expand(3, -1))


@pytest.mark.slow
def test_attention_and_linears_in_fp8_stay_and_the_nvfp4_ones_learn(digits, calls, five_calls, tmp_path):
    (tmp_path / "mixed.yaml").write_text(
        (RECIPE % (2, 4)) + "attention: fp8\nformats: {rules: [{linears: '*.norm*.linear', format: fp8}]}\n"
    )
    quantize(digits, tmp_path / "qat", recipe=tmp_path / "mixed.yaml", calibration=five_calls)
    checkpoint = read(tmp_path / "qat")
    plain = tensors_in_folder(digits)
    student = make_student(checkpoint, lambda name: plain[name].tensor())
    assert len(list(student_linears(student))) == 20 - len(checkpoint.fp8) < 20
    assert torch.equal(answer(student, calls[1]), answer(load(tmp_path / "qat", torch.float32), calls[1]))
    student(**{name: value.float() for name, value in calls[1].items()})[0].square().mean().backward()
    assert all(linear.weight.grad.abs().max() > 0 for _, linear in student_linears(student))


@pytest.mark.slow
def test_what_the_student_computes_is_what_is_stored(trained, calls):
    folder, student = trained
    stored = load(folder, torch.float32)
    for call in calls[:2]:
        assert torch.equal(answer(student, call), answer(stored, call))


@pytest.mark.slow
def test_training_brings_the_student_nearer_to_its_teacher(trained, start):
    folder, _ = trained
    losses = json.loads((folder / "training" / "loss.json").read_text())["velocity"]
    assert len(losses) == 12
    models = {"qat": load(folder, torch.float32), "ptq": load(start, torch.float32)}
    found = compare(load_transformer(), models, (1000,), 20, steps=5)
    assert found.difference("qat", "ptq", "velocity_error").high < 0


@pytest.mark.slow
def test_the_manifest_tells_how_it_was_trained_and_the_curve_is_kept(trained):
    folder, _ = trained
    manifest = load_json(folder / "fp4trt.json")
    assert manifest["recipe"]["method"]["learning_rate"] == 0.0002
    assert manifest["training"]["start"]["name"] == "nvfp4-ptq"
    assert manifest["training"]["velocity_loss"]["last"] > 0
    assert {"training/loss.json", "training/loss.png"} <= manifest["files"].keys()
    assert (folder / "training" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.slow
def test_global_scales_and_groups_are_those_it_started_from(trained, start):
    after, before = read(trained[0]), read(start)
    changed = 0
    for path in before.quantized:
        for kind in ("weight_scale", "weight_scale_2", "input_scale"):
            one, other = (each.tensor(f"{path}.{kind}") for each in (before, after))
            assert torch.equal(one.float(), other.float()), path
        changed += int((before.tensor(f"{path}.weight") != after.tensor(f"{path}.weight")).sum())
    assert changed > 1000


_KILLED = """
import os, signal, sys
from calibration.methods.qat import training
import fp4trt

training._REST_S = training._SHARE = 0
keep = training._Loop._keep


def keep_and_die(self, done):
    keep(self, done)
    if done == 7:
        os.kill(os.getpid(), signal.SIGKILL)


training._Loop._keep = keep_and_die
sys.exit(fp4trt.run(sys.argv[1:]))
"""


_KILLED_BEFORE_ITS_MARK = """
import os, signal, sys
from fp4trt import work_folder
import fp4trt

work_folder.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(fp4trt.run(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.slow
def test_a_killed_training_goes_on_and_ends_with_the_same_bytes(digits: Path, trained, five_calls, tmp_path, capfd):
    (tmp_path / "short.yaml").write_text(RECIPE % (12, 20))
    command = ["quantize", str(digits), "-o", str(tmp_path / "qat"), "--recipe", str(tmp_path / "short.yaml")]
    command += ["--calibration", str(five_calls)]
    for script, left in ((_KILLED_BEFORE_ITS_MARK, ["training.json.partial"]), (_KILLED, None)):
        status, printed = warm_python.run(script, *command)
        assert status == -9, printed
        found = [path.name for path in (tmp_path / "qat.training.partial").iterdir()]
        assert left is None or found == left
    assert fp4trt.run(command) == 0
    assert "resuming: 7 of 12 steps are done" in capfd.readouterr().err
    for name in (WEIGHTS, "fp4trt.json", "training/loss.json", "training/loss.png"):
        assert (tmp_path / "qat" / name).read_bytes() == (trained[0] / name).read_bytes(), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qat", "short.yaml"]


@pytest.mark.slow
def test_two_processes_calibrate_to_the_same_maxima_as_one_and_train(digits: Path, start, five_calls, tmp_path):
    (tmp_path / "short.yaml").write_text(RECIPE % (2, 4))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", str(port)]
    command = ["quantize", str(digits), "-o", str(tmp_path / "qat"), "--recipe", str(tmp_path / "short.yaml")]
    command += ["--calibration", str(five_calls)]
    done = subprocess.run(
        [sys.executable, "-m", *launch, "-m", "fp4trt", *command],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after, before = read(tmp_path / "qat"), read(start)
    for path in before.quantized:
        assert torch.equal(after.tensor(f"{path}.input_scale"), before.tensor(f"{path}.input_scale")), path
    assert any(
        not torch.equal(after.tensor(f"{path}.weight"), before.tensor(f"{path}.weight")) for path in before.quantized
    )
    assert len(load_json(tmp_path / "qat" / "training" / "loss.json")["velocity"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["qat", "short.yaml"]


def test_each_process_takes_its_share(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert list(processes.share(range(5))) == [1, 3]
    assert list(processes.share(range(1))) == [0]
    assert not processes.is_main()


def options(**changes: object) -> QAT:
    return QAT(**{"name": "qat", "steps": 2, "learning_rate": 1e-3, "batch": 4, "warm_up": 0, **changes})


def losses_of(digits: Path, start: Path, calls, work: Path, **changes: object) -> tuple[dict, dict]:
    config = load_json(digits / "config.json")
    student, teacher = of_digits(digits, start), load_transformer()
    state, losses = train(student, teacher, calls, family_of(config), config, options(**changes), work)
    return student_tensors(student, state), losses


def test_the_blocks_features_can_take_part_and_checkpointing_changes_nothing(digits, start, calls, tmp_path):
    plain, losses = losses_of(digits, start, calls, tmp_path, block_loss=0.1)
    again, same = losses_of(digits, start, calls, tmp_path, block_loss=0.1, gradient_checkpointing=True)
    assert 0 < losses["blocks"][0] < 0.2
    assert same["blocks"] == pytest.approx(losses["blocks"])
    differing = sum(int((plain[name] != again[name]).sum()) for name in plain if name.endswith(".weight"))
    assert differing < 100


def test_accelerates_own_configuration_decides_about_precision(digits, start, calls, tmp_path, monkeypatch):
    from accelerate.state import AcceleratorState

    _, exact = losses_of(digits, start, calls, tmp_path)
    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    _, mixed = losses_of(digits, start, calls, tmp_path)
    AcceleratorState._reset_state(True)
    assert exact["velocity"] != mixed["velocity"] == pytest.approx(exact["velocity"], rel=0.5)


def test_a_batch_that_does_not_split_over_the_processes_is_refused(digits, start, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(BadRecipe, match="batch 4 does not split over 3 processes"):
        losses_of(digits, start, calls, tmp_path)


def test_a_start_that_leaves_nothing_to_train_is_refused(digits: Path, five_calls, tmp_path, capfd):
    (tmp_path / "mxfp8.yaml").write_text((RECIPE % (2, 4)) + "formats: {default: mxfp8}\n")
    save_inputs(tmp_path / "inputs.safetensors", load_inputs(five_calls)[:1])
    command = ["quantize", str(digits), "-o", str(tmp_path / "qat"), "--recipe", str(tmp_path / "mxfp8.yaml")]
    assert fp4trt.run([*command, "--calibration", str(tmp_path / "inputs.safetensors")]) == 2
    said = capfd.readouterr().err
    assert "leave no linear in nvfp4, and no other is trained" in said
    assert "quantizing" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.safetensors", "mxfp8.yaml"]


def test_training_that_starts_from_training_is_refused(digits: Path, tmp_path, capfd):
    (tmp_path / "twice.yaml").write_text((RECIPE % (2, 4)).replace("nvfp4-ptq", "nvfp4-qat"))
    command = ["quantize", str(digits), "-o", str(tmp_path / "qat"), "--recipe", str(tmp_path / "twice.yaml")]
    assert fp4trt.run(command) == 2
    assert "short starts from nvfp4-qat, which trains too" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["twice.yaml"]


def walker(calls, config, **changes: object) -> Trajectories:
    """Ways of a teacher that always answers 2."""
    given = {"batch": 6, "visits": 5, "seed": (0, 0), "synthesise": True, **changes}
    answer = lambda inputs: torch.full(inputs["hidden_states"].shape, 2.0)  # noqa: E731
    return Trajectories(answer, calls, family_of(config), config, **given)


def test_states_lie_on_the_teachers_way_at_random_times(digits, calls):
    config = load_json(digits / "config.json")
    rounds = [walker(calls, config).states(step) for step in range(5)]
    times = torch.cat([one.inputs["timestep"].float() for one in rounds])
    states = torch.cat([one.inputs["hidden_states"].float() for one in rounds])
    assert times.min() >= 0.25  # the last captured time of four steps
    assert (times == 1).sum() == 6
    assert len(times.unique()) > 15
    # With a constant velocity, going back to time 1 gives the noise that each way began with: five states of each.
    noise = states + 2 * (1 - times.reshape(-1, 1, 1))
    ways = {tuple((row.flatten()[:3] * 4).round().tolist()) for row in noise}
    assert len(ways) <= 18  # 6, but for rounding of BF16 states
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert all(torch.equal(one.answers, torch.full_like(one.answers, 2)) for one in rounds)


def test_a_step_has_the_same_states_whatever_was_asked_before(digits, calls):
    config = load_json(digits / "config.json")
    one, other = walker(calls, config), walker(calls, config)
    one.states(0)
    assert torch.equal(one.states(7).inputs["hidden_states"], other.states(7).inputs["hidden_states"])
    apart = walker(calls, config, seed=(0, 1)).states(7)
    assert not torch.equal(one.states(7).inputs["hidden_states"], apart.inputs["hidden_states"])


def test_captured_states_can_be_taken_as_they_are(digits, calls):
    config = load_json(digits / "config.json")
    states = walker(calls, config, synthesise=False).states(3)
    known = torch.cat([call["hidden_states"] for call in calls])
    assert all(any(torch.equal(row, one) for one in known) for row in states.inputs["hidden_states"])


def test_a_model_whose_state_is_more_than_noise_is_refused(digits, calls):
    config = {**load_json(digits / "config.json"), "out_channels": 8}
    with pytest.raises(BadInputs, match="takes 16 channels and answers 8"):
        walker(calls, config)


def test_a_model_that_reorders_channels_is_asked_of_captured_states_alone():
    config = {**MODELS["wan"].config, "_class_name": MODELS["wan"].class_name}
    calls = [family_of(config).example_inputs(config, (2, 4, 3), 0, torch.bfloat16)]
    with pytest.raises(BadInputs, match=r"channels in another order.*expected data: captured"):
        walker(calls, config)
    assert walker(calls, config, synthesise=False).states(0).inputs["timestep"].max() > 1


def test_the_learning_rate_warms_up_and_falls_to_nothing():
    chosen = options(steps=100, warm_up=10, learning_rate=1.0)
    rates = [learning_rate(step, chosen) for step in range(100)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)
    assert 0 <= rates[-1] < 0.001


def test_where_the_biases_alone_learn_every_code_and_scale_stays(digits, start, calls, tmp_path):
    student, teacher = of_digits(digits, start, "biases"), load_transformer()
    config = load_json(digits / "config.json")
    state, losses = train(student, teacher, calls, family_of(config), config, options(learn="biases"), tmp_path)
    before, after = student_tensors(student, of_digits(digits, start).state_dict()), student_tensors(student, state)
    changed = {name for name, value in after.items() if not torch.equal(_bits(value), _bits(before[name]))}
    assert len(losses["velocity"]) == 2
    assert changed
    assert all(name.endswith(".bias") for name in changed)


def _bits(value):
    return value.detach().contiguous().reshape(-1).view(torch.uint8)


def test_a_model_with_several_outputs_is_refused(tmp_path: Path) -> None:
    model = MODELS["ltx2"]
    model.save(tmp_path / "source")
    config = load_json(tmp_path / "source" / "config.json")
    save_inputs(tmp_path / "in.safetensors", [family_of(config).example_inputs(config, (1, 16, 8), 0, torch.bfloat16)])
    with pytest.raises(BadRecipe, match="one output, and ltx2 has video and audio; expected another method"):
        quantize(tmp_path / "source", tmp_path / "out", recipe="nvfp4-qat", calibration=tmp_path / "in.safetensors")
    assert not (tmp_path / "out").exists()
