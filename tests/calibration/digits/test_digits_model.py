"""The stored files of the built-in model: they load, they are small, and they are what was measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from calibration.digits import DIRECTORY
from calibration.digits.latents import decode, encode, image_ids
from calibration.digits.model import METRICS_NAME, load_metrics, load_transformer
from calibration.digits.prompts import WORDS, embed_prompts, embed_word, words_of
from calibration.digits.sampling import model_inputs, noise, sample
from generation.comparison.digit_classifier import FILE_NAME, load_classifier, predict
from generation.comparison.digits import balanced_labels

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def transformer():
    return load_transformer()


def block_linears(transformer):
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in name
    }


def test_the_weights_are_stored_in_bf16():
    with safe_open(DIRECTORY / WEIGHTS, framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_everything_that_ships_stays_under_six_megabytes():
    names = ("config.json", WEIGHTS, FILE_NAME, METRICS_NAME)
    assert sum((DIRECTORY / name).stat().st_size for name in names) < 6_000_000


def test_the_config_is_the_flux_transformers():
    config = json.loads((DIRECTORY / "config.json").read_text(encoding="utf-8"))
    assert config["_class_name"] == "FluxTransformer2DModel"
    assert (config["num_layers"], config["num_single_layers"], config["guidance_embeds"]) == (2, 4, True)


def test_every_linear_to_quantize_has_in_features_in_whole_blocks_of_16(transformer):
    linears = block_linears(transformer)
    assert len(linears) == 14 * 2 + 6 * 4
    assert all(linear.in_features % 16 == 0 for linear in linears.values())


def test_no_linear_to_quantize_was_left_at_zero_by_its_initialisation(transformer):
    assert min(linear.weight.abs().max().item() for linear in block_linears(transformer).values()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_answers_with_a_velocity_of_the_latents_shape(dtype):
    inputs = model_inputs(noise(3, seed=0), words_of([1, 2, 3]), 1.0, 3.5, dtype)
    with torch.inference_mode():
        velocity = load_transformer(dtype=dtype)(**inputs, return_dict=False)[0]
    assert velocity.shape == (3, 16, 16)
    assert velocity.dtype == dtype
    assert velocity.isfinite().all()


@pytest.mark.parametrize(
    "name", ["encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance"]
)
def test_every_input_changes_the_answer(transformer, name):
    inputs = model_inputs(noise(2, seed=0), words_of([1, 2]), 0.5, 3.5, torch.float32)
    changed = inputs | {name: inputs[name] * 0.5 + torch.rand(inputs[name].shape)}
    with torch.inference_mode():
        before, after = (transformer(**case, return_dict=False)[0] for case in (inputs, changed))
    assert (before - after).abs().max() > 1e-3


def test_the_stored_hashes_are_the_files():
    stored = load_metrics()["sha256"]
    assert set(stored) == {"config.json", WEIGHTS, FILE_NAME}
    assert stored == {name: hashlib.sha256((DIRECTORY / name).read_bytes()).hexdigest() for name in stored}


def test_the_stored_accuracies_are_good_enough():
    metrics = load_metrics()
    assert metrics["classifier_held_out_accuracy"] >= 0.99
    assert metrics["accuracy_bf16"] >= 0.97


def test_the_model_does_not_copy_its_training_images():
    metrics = load_metrics()
    held_out = metrics["nearest_training_image_of_held_out"]
    assert metrics["nearest_training_image_of_samples"] > 0.7 * held_out


def test_the_classifier_still_recognises_the_samples(transformer):
    labels = balanced_labels(200)
    seen = predict(load_classifier(), decode(sample(transformer, labels, seed=7)))
    recognised = (seen == torch.tensor(labels)).double().mean().item()
    assert recognised >= 0.95
    assert abs(recognised - load_metrics()["accuracy_bf16"]) < 0.04


def test_the_classifier_still_recognises_real_held_out_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    selection = pytest.importorskip("sklearn.model_selection")
    data = datasets.load_digits()
    _, rows = selection.train_test_split(range(len(data.target)), test_size=0.2, random_state=0, stratify=data.target)
    small = torch.tensor(data.images[rows], dtype=torch.float32).unsqueeze(1) / 16
    images = nn.functional.interpolate(small, (16, 16), mode="bicubic", align_corners=False)
    seen = predict(load_classifier(), images.squeeze(1).clamp(0, 1))
    assert (seen == torch.tensor(data.target[rows])).double().mean().item() == pytest.approx(
        load_metrics()["classifier_held_out_accuracy"]
    )


def test_asking_for_the_directory_does_not_import_torch():
    script = "import sys, calibration.digits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=DIRECTORY.parents[1], check=False).returncode == 0


def test_decoding_undoes_encoding():
    images = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(decode(encode(images)), images, atol=1e-6)


def test_a_token_holds_a_four_by_four_patch_at_the_place_its_id_says():
    images = torch.zeros(1, 16, 16)
    images[0, 4:8, 8:12] = 1
    token = encode(images)[0].mean(-1).argmax().item()
    assert image_ids()[token].tolist() == [0, 1, 2]
    assert encode(images)[0, token].tolist() == [1.0] * 16


def test_a_word_is_embedded_as_the_bits_of_its_hash():
    first = hashlib.sha256(b"three").digest()[0]
    expected = [1.0 if first & (128 >> bit) else -1.0 for bit in range(8)]
    assert embed_word("three")[:8].tolist() == expected


def test_the_words_differ_in_tokens_and_in_the_pooled_embedding():
    tokens, pooled = embed_prompts(WORDS)
    assert tokens.shape == (10, 8, 64)
    assert len({tuple(row) for row in pooled.tolist()}) == 10


@pytest.mark.parametrize("prompt", ["", "one two three four five six seven eight nine"])
def test_a_prompt_of_no_or_too_many_words_is_refused(prompt):
    with pytest.raises(ValueError, match="expected 1 to 8"):
        embed_prompts([prompt])


def test_a_label_that_is_no_digit_is_refused():
    with pytest.raises(ValueError, match="label 10: expected a digit"):
        words_of([3, 10])
