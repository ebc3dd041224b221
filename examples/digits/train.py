"""Train fp4trt's built-in model and its judge from scikit-learn's handwritten digits.

One seed, one thread, a fixed number of steps: the same machine and versions give the same bytes, in 6 to 7
CPU-minutes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from calibration.digits.latents import IMAGE_SIZE, decode, encode, image_ids, text_ids
from calibration.digits.model import METRICS_NAME, load_transformer
from calibration.digits.prompts import WIDTH, WORDS, embed_prompts
from calibration.digits.sampling import STEPS, sample
from generation.comparison.digit_classifier import FILE_NAME, accuracy, build_classifier

CONFIG = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "guidance_embeds": True,
}
BATCH = 64
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 100
FLAT_FRACTION = 0.3
EMA_DECAY = 0.998
CLASSIFIER_EPOCHS = 80
EVALUATION_IMAGES = 1000


@dataclass(frozen=True)
class Digits:
    """Images FP32 [N, 16, 16] in [0, 1] and labels int64 [N]; nothing trains on the held-out part."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor


def load_images() -> Digits:
    """Load the 1797 8x8 digits, enlarge them to 16x16, and hold out a fifth, balanced over the labels."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = functional.interpolate(small, size, mode="bicubic", align_corners=False).squeeze(1).clamp(0, 1)
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, held_out = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=data.target)
    return Digits(images[train], labels[train], images[held_out], labels[held_out])


def distort(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift, turn, scale and blur-with-noise a batch [B, 1, 16, 16], so that the judge is not brittle."""
    batch = len(images)
    uniform = torch.rand(4, batch, generator=generator) * 2 - 1
    angle, scale, shift = uniform[0] * 0.2, 1 + uniform[1] * 0.1, uniform[2:] * 0.12
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cosine, -sine, shift[0]], -1), torch.stack([sine, cosine, shift[1]], -1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    return (moved + 0.05 * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def train_classifier(digits: Digits, seed: int) -> nn.Sequential:
    """Train the judge on distorted real digits."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = build_classifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLASSIFIER_EPOCHS)
    with click.progressbar(range(CLASSIFIER_EPOCHS), label="Training the classifier", file=sys.stderr) as epochs:
        for _ in epochs:
            for rows in torch.randperm(len(digits.train_labels), generator=generator).split(BATCH):
                logits = classifier(distort(digits.train_images[rows].unsqueeze(1), generator))
                loss = functional.cross_entropy(logits, digits.train_labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            rate.step()
    return classifier.eval()


def build_transformer(heads: int) -> Any:
    """Return the untrained transformer; zero modulation and output make every block start as the identity."""
    model: Any = FluxTransformer2DModel(**{**CONFIG, "num_attention_heads": heads})  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        modulation = "norm" in name and ".linear." in name
        if modulation or name.startswith("proj_out."):
            nn.init.zeros_(parameter)
    return model


def rate_at(step: int, steps: int) -> float:
    """Return the factor on the learning rate: linear warm-up, flat for 30 % of the steps, cosine to zero."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    done = max(0.0, step / steps - FLAT_FRACTION) / (1 - FLAT_FRACTION)
    return 0.5 * (1 + math.cos(math.pi * done))


def flow_loss(
    model: Any, digits: Digits, text: tuple[torch.Tensor, torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Return the rectified-flow loss of one random batch: target noise - image, logit-normal times."""
    rows = torch.randint(len(digits.train_labels), (BATCH,), generator=generator)
    clean, labels = encode(digits.train_images[rows]), digits.train_labels[rows]
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.sigmoid(torch.randn(BATCH, generator=generator))
    guidance = 1 + 4 * torch.rand(BATCH, generator=generator)
    mixed = clean + times[:, None, None] * (noise - clean)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(
            hidden_states=mixed,
            encoder_hidden_states=text[0][labels],
            pooled_projections=text[1][labels],
            timestep=times,
            img_ids=image_ids(),
            txt_ids=text_ids(text[0].shape[1]),
            guidance=guidance,
            return_dict=False,
        )[0]
    return functional.mse_loss(velocity.float(), noise - clean)


def train_transformer(digits: Digits, seed: int, steps: int, heads: int) -> Any:
    """Train the transformer and return the moving average of its weights, rounded to BF16."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_transformer(heads).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    text = embed_prompts(WORDS)
    with click.progressbar(range(steps), label="Training the transformer", file=sys.stderr) as bar:
        for step in bar:
            loss = flow_loss(model, digits, text, generator)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            # A smaller decay at the start: the average may not lag while the weights still move fast.
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            with torch.no_grad():
                for kept, current in zip(average.parameters(), model.parameters(), strict=True):
                    kept.lerp_(current, 1 - decay)
            if step % 100 == 0 or step == steps - 1:
                click.echo(f"step {step}: loss {loss.item():.4f}", err=True)
    for parameter in average.parameters():
        parameter.data = parameter.data.bfloat16()
    return average.eval()


def nearest(images: torch.Tensor, others: torch.Tensor) -> float:
    """Return the median L2 distance from each image [B, 16, 16] to the nearest of the others."""
    return torch.cdist(images.flatten(1), others.flatten(1)).min(1).values.median().item()


def measure(directory: Path, classifier: nn.Module, digits: Digits) -> dict[str, Any]:
    """Judge the stored BF16 weights, computed in FP32: are the digits recognised, and not mere copies?"""
    labels = torch.arange(EVALUATION_IMAGES) % 10
    images = decode(sample(load_transformer(directory), labels.tolist(), seed=0))
    return {
        "classifier_held_out_accuracy": accuracy(classifier, digits.held_out_images, digits.held_out_labels),
        "classifier_held_out_images": len(digits.held_out_labels),
        "accuracy_bf16": accuracy(classifier, images, labels),
        "accuracy_images": EVALUATION_IMAGES,
        "accuracy_sampling_steps": STEPS,
        "accuracy_seed": 0,
        "nearest_training_image_of_samples": nearest(images, digits.train_images),
        "nearest_training_image_of_held_out": nearest(digits.held_out_images, digits.train_images),
    }


def write_model(directory: Path, seed: int, steps: int, heads: int) -> dict[str, Any]:
    """Train both networks, write them with what was measured into ``directory``, and return the latter."""
    digits = load_images()
    classifier = train_classifier(digits, seed)
    train_transformer(digits, seed, steps, heads).save_pretrained(directory)
    state = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(state, directory / FILE_NAME)
    metrics = measure(directory, classifier, digits)
    files = sorted(path for path in directory.iterdir() if path.is_file())
    metrics |= {"training_seed": seed, "training_steps": steps}
    metrics["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    text = json.dumps(metrics, indent=2, sort_keys=True) + "\n"
    (directory / METRICS_NAME).write_bytes(text.encode("utf-8"))
    return metrics


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("build/digits"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=1900, show_default=True, help="Training steps of 64 images.")
@click.option(
    "--heads",
    type=click.IntRange(1),
    default=CONFIG["num_attention_heads"],
    show_default=True,
    help="Attention heads, each 64 wide; another number makes another model, to try a recipe on.",
)
@click.option("--force", is_flag=True, help="Replace an existing output directory.")
def main(output: Path, seed: int, steps: int, heads: int, force: bool) -> None:
    """Train the digits model and its classifier into a new directory.

    \b
    Example:
      python examples/digits/train.py -o build/digits
    """
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists: give another --output, or --force to replace it")
    # One thread, or the order of the sums, and with it the bytes, would depend on the machine's cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.process_time()
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    metrics = write_model(partial, seed, steps, heads)
    if output.exists():
        shutil.rmtree(output)
    partial.replace(output)
    click.echo(f"{metrics['classifier_held_out_accuracy']:.1%} of held-out digits recognised by the classifier")
    click.echo(f"{metrics['accuracy_bf16']:.1%} of {metrics['accuracy_images']} BF16 samples recognised")
    click.echo(f"{output}: written in {time.process_time() - started:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
