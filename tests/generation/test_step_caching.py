"""Step caching: which steps are left out, what stands for them, and how it is fitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fp4trt
from calibration.checkpoints.plain import load_source
from calibration.digits.description import DESCRIPTION
from fp4trt.errors import BadOption, BadStepCache
from fp4trt.families.digits import DIGITS
from generation.comparison.pixel_space import pixel_sampler
from generation.step_caching.cache import StepCache
from generation.step_caching.deciders import relative_distance, time_signal
from generation.step_caching.front import modulated_signal
from generation.step_caching.search import evenly
from generation.step_caching.settings import (
    Model,
    Polynomial,
    StepCaching,
    model_of,
    read_settings,
    refuse_other_model,
)
from generation.transformer import GraphTransformer

STEPS = 12
TIMES = [1 - index / STEPS for index in range(STEPS)]
KNOWN = Model(family="flux-digits", config="c", embedders="e")
RISING = Polynomial(coefficients=(0.2, 0.15), domain=(0.0, 1.0), least=0.01)


def _settings(**changes: Any) -> StepCaching:
    usual: dict[str, Any] = {
        "model": KNOWN, "steps": STEPS, "decider": "latents", "polynomial": RISING, "threshold": 0.35, "first": 2,
        "last": 1, "reuse": "linear",
    }  # fmt: skip
    return StepCaching(**{**usual, **changes})


class Counted:
    """Answers t^2 times the latents, and t; notes the times of its calls."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, *, hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor, ...]:
        self.times.append(float(timestep[0]))
        return timestep[:, None, None] ** 2 * hidden_states, timestep.clone()


def _latents(seed: int = 0, images: int = 2) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    steps = torch.randn((STEPS, images, 4, 8), generator=random) * torch.linspace(0.1, 1.5, STEPS)[:, None, None, None]
    return list(steps.cumsum(0))


def _call(cache: Any, latents: torch.Tensor, time: float) -> tuple[torch.Tensor, ...]:
    found: tuple[torch.Tensor, ...] = cache(
        hidden_states=latents, timestep=torch.full((len(latents),), time), return_dict=False
    )
    return found


def _computed_by_definition(latents: list[torch.Tensor], settings: StepCaching) -> list[int]:
    """TeaCache's rule, written down step by step."""
    computed, total = [], 0.0
    for index in range(STEPS):
        if settings.first <= index < STEPS - settings.last:
            now, before = latents[index].double(), latents[index - 1].double()
            change = [float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(now, before, strict=True)]
            place = min(max(sum(change) / len(change), 0.0), 1.0)
            total += max(0.2 + 0.15 * (2 * place - 1), 0.01)
            if total < settings.threshold:
                continue
        computed.append(index)
        total = 0.0
    return computed


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("threshold", [0.25, 0.35, 0.9])
def test_steps_are_left_out_as_teacache_says(seed: int, threshold: float) -> None:
    inner, settings, latents = Counted(), _settings(threshold=threshold), _latents(seed)
    cache = StepCache(inner, settings)
    for value, time in zip(latents, TIMES, strict=True):
        _call(cache, value, time)
    wanted = _computed_by_definition(latents, settings)
    assert inner.times == pytest.approx([TIMES[index] for index in wanted])
    assert (cache.counts.computed, cache.counts.skipped) == (len(wanted), STEPS - len(wanted))
    assert 2 < len(wanted) < STEPS


@pytest.mark.parametrize(("reuse", "wanted"), [("linear", (0.36, 0.7)), ("hold", (0.64, 0.8))])
def test_the_line_through_the_last_two_outputs_or_the_last_one_stands_for_a_step(
    reuse: str, wanted: tuple[float, float]
) -> None:
    cache = StepCache(Counted(), _settings(reuse=reuse), skipped={2})
    latents = torch.ones(1, 4, 8)
    for time in (1.0, 0.8):
        _call(cache, latents, time)
    velocity, time = _call(cache, latents, 0.7)
    # from 1 and .64 at the times 1 and .8: .46 at .7
    assert velocity[0, 0, 0] == pytest.approx(0.46 if reuse == "linear" else wanted[0])
    assert time[0] == pytest.approx(wanted[1])


def test_two_calls_a_step_and_named_contexts_have_caches_of_their_own() -> None:
    latents = _latents()
    by_place, by_name, alone = (StepCache(Counted(), _settings()) for _ in range(3))
    for value, time in zip(latents, TIMES, strict=True):
        once = _call(alone, value, time)
        twice = [_call(by_place, value, time) for _ in range(2)]
        named = []
        for name in ("cond", "uncond"):
            with by_name.cache_context(name):
                named.append(_call(by_name, value, time))
        for found in (*twice, *named):
            assert all(torch.equal(one, other) for one, other in zip(found, once, strict=True))
    for cache in (by_place, by_name):
        assert cache.counts == type(cache.counts)(2 * alone.counts.computed, 2 * alone.counts.skipped)


def test_another_picture_begins_with_computed_steps() -> None:
    inner = Counted()
    cache = StepCache(inner, _settings(threshold=9.0))
    for _ in range(2):
        for value, time in zip(_latents(), TIMES, strict=True):
            _call(cache, value, time)
    assert inner.times == pytest.approx([TIMES[index] for index in (0, 1, STEPS - 1)] * 2)
    _call(cache, _latents(images=1)[3], TIMES[3])  # of another shape, in the middle
    assert inner.times[-1] == pytest.approx(TIMES[3])


def test_every_nth_step_is_as_many_and_none_of_the_ends() -> None:
    assert evenly(12, 3) == {2, 6, 9}
    assert evenly(12, 30, 3, 2) == set(range(3, 10))


def test_the_times_embedding_is_that_of_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    wanted = get_timestep_embedding(torch.tensor([700.0]), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert (time_signal(0.7) - wanted).abs().max() < 1e-4


def test_the_modulated_input_is_the_models_and_no_block_is_read(digits: Path, quantized_digits: Path) -> None:
    config_inputs = DIGITS.example_inputs(_config(digits), (2, 16, 8), 0, torch.float32)
    model, seen = load_source(digits, torch.float32), []
    first: Any = model.get_submodule("transformer_blocks.0.norm1")
    first.register_forward_hook(lambda _module, _given, found: seen.append(found[0]))
    with torch.no_grad():
        model(**config_inputs, return_dict=False)
    assert torch.allclose(modulated_signal(digits)(config_inputs), seen[0], atol=1e-6)
    rounded = modulated_signal(quantized_digits)(config_inputs)
    assert relative_distance(rounded, seen[0]).max() < 0.2


def _config(folder: Path) -> dict[str, Any]:
    from fp4trt.json_file import load_json

    found: dict[str, Any] = load_json(folder / "config.json")
    return found


def test_a_graph_draws_with_steps_left_out(quantized_digits: Path) -> None:
    settings = _settings(model=model_of(quantized_digits), decider="time", steps=6, threshold=9.0)
    graph = GraphTransformer(quantized_digits / "model.onnx")
    cache = StepCache(graph, settings)
    sampler = pixel_sampler(DIGITS, DESCRIPTION, DESCRIPTION.prompts[:2], 6)
    (whole,), (less,) = sampler.draw(graph, 0), sampler.draw(cache, 0)
    assert (cache.counts.computed, cache.counts.skipped) == (3, 3)
    assert 0 < (whole.images - less.images).abs().mean() < 0.2


@pytest.fixture(scope="module")
def fitted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "teacache.yaml"
    _fit(digits, path)
    return path


def _fit(source: Path, path: Path, *words: object) -> int:
    small = ("--steps", 10, "--images", 4, "--check-images", 4, "--candidates", 6, "--seeds", 0, "--force")
    return fp4trt.run(["teacache", str(source), "-o", str(path), *map(str, (*small, *words))])


@pytest.mark.slow
def test_it_is_fitted_alike_each_time_and_tells_what_it_found(
    digits: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert _fit(digits, tmp_path / "again.yaml", "--plot", tmp_path / "curve.html") == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "again.yaml").read_bytes() == fitted.read_bytes()
    settings = read_settings(fitted)
    checked = settings.figures["checked"]
    assert settings.model == model_of(digits)
    assert 3 <= checked["skipped"] <= 7
    assert checked["psnr_db"]["cached"]["mean"] > checked["psnr_db"]["every_nth_hold"]["mean"]
    assert f"{checked['skipped']:g} of 10 steps left out" in printed
    page = (tmp_path / "curve.html").read_text(encoding="utf-8")
    assert "every n-th step" in page
    assert "http:" not in page
    assert "https:" not in page


def test_what_cannot_be_fitted_is_refused_in_one_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, reason in (
        (("--check-seeds", "0"), "check_seeds has 0, which is fitted on; expected other noise"),
        (("--plot", "x.gif"), "plot is x.gif; expected a name that ends in .html, .svg, .png"),
        (("--resolution", "64"), "--resolution is of a pipeline; this model draws 16 x 16 pixels: leave it out"),
        (("--first", "30"), "first is 30 and last is "),
    ):
        assert _fit(digits, tmp_path / "x.yaml", *words) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(BadOption, match="of the decider 'modulated'"):
        StepCache(Counted(), _settings(decider="modulated"))
    assert list(tmp_path.iterdir()) == []


def test_settings_of_another_model_or_damaged_ones_are_refused(
    digits: Path, quantized_digits: Path, built_in: Path, tmp_path: Path
) -> None:
    path = tmp_path / "teacache.yaml"
    settings = _settings(model=model_of(digits))
    refuse_other_model(settings, quantized_digits, path)
    with pytest.raises(BadStepCache, match="of another config than"):
        refuse_other_model(settings, built_in, path)
    for text, reason in (
        (None, "does not exist; expected what fp4trt teacache wrote"),
        ("a: [", "is not YAML"),
        ("- 1\n", "expected what fp4trt teacache wrote"),
        (settings.as_yaml().replace("first: 2", "first: 0"), "first: Input should be greater than or equal to 1"),
        (yaml.safe_dump({**yaml.safe_load(settings.as_yaml()), "speed": 1}), "speed: Extra inputs are not permitted"),
    ):
        if text is not None:
            path.write_text(text, encoding="utf-8")
        with pytest.raises(BadStepCache, match=reason):
            read_settings(path)
    path.write_text(settings.as_yaml(), encoding="utf-8")
    assert read_settings(tmp_path) == settings


def test_another_number_of_steps_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    StepCache(Counted(), _settings(), steps=30)
    assert f"step caching was fitted for {STEPS} steps, and 30 are drawn" in capsys.readouterr().err
    StepCache(Counted(), _settings(), steps=2)
    assert "step caching leaves out none of 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize("decider", ["time", "modulated"])
def test_generate_leaves_out_steps_and_says_so(
    decider: str, quantized_digits: Path, built_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(model=model_of(quantized_digits), decider=decider, steps=6, threshold=9.0)
    (tmp_path / "teacache.yaml").write_text(settings.as_yaml(), encoding="utf-8")
    words = ["-p", "seven", "--count", "2", "--teacache", str(tmp_path), "-o", str(tmp_path / "a.png"), "--json"]
    capsys.readouterr()
    assert fp4trt.run(["generate", str(quantized_digits / "model.onnx"), *words]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["calls"], said["calls_left_out"]) == (12, 6)
    assert said["images"][0]["steps"] == 6
    assert said["images"][0]["teacache"]["decider"] == decider
    assert fp4trt.run(["generate", str(built_in), *words]) == 2
    assert "is for a flux-digits model of another config than" in capsys.readouterr().err
