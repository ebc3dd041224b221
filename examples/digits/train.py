"""Train fp4trt's built-in model and its judge from scikit-learn's handwritten digits, or a model like it.

One seed, one thread, a fixed number of steps: the same machine and versions give the same bytes, in 6 to 7
CPU-minutes, also where the run was killed and started again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from calibration.checkpoints.plain import load_source
from calibration.digits.description import DESCRIPTION
from calibration.digits.latents import IMAGE_SIZE, decode
from calibration.digits.model import METRICS_NAME
from calibration.digits.prompts import WIDTH, WORDS, embed_prompts, words_of
from calibration.digits.sampling import STEPS
from calibration.pixel_space.description import write_description
from calibration.pixel_space.sampling import sample
from calibration.pixel_space.training import Batch, Plan, publishing, start_as_identity, train
from fp4trt.families import Family
from fp4trt.families.flux import FLUX
from fp4trt.families.flux2 import FLUX2
from generation.comparison.digit_classifier import FILE_NAME, accuracy, build_classifier

FAMILIES = {family.name: family for family in (FLUX, FLUX2)}
COMMON = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "joint_attention_dim": WIDTH,
    "guidance_embeds": True,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": COMMON | {"axes_dims_rope": (16, 24, 24), "pooled_projection_dim": WIDTH},
    "flux2": COMMON | {"axes_dims_rope": (16, 16, 16, 16)},
}
BATCH = 64
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


def build_transformer(family: Family, heads: int) -> Any:
    """Return the untrained transformer, every block of which starts as the identity."""
    model = getattr(diffusers, family.class_name)(**{**CONFIGS[family.name], "num_attention_heads": heads})
    start_as_identity(model)
    return model


def train_transformer(digits: Digits, family: Family, plan: Plan, heads: int, folder: Path) -> Any:
    """Train the transformer and return the moving average of its weights, rounded to BF16."""
    tokens, pooled = embed_prompts(WORDS)

    def draw(generator: torch.Generator) -> Batch:
        rows = torch.randint(len(digits.train_labels), (BATCH,), generator=generator)
        labels = digits.train_labels[rows]
        return Batch(digits.train_images[rows].unsqueeze(1), tokens[labels], pooled[labels])

    def report(step: int, loss: float, _: Any) -> None:
        if step % 100 == 1 or step == plan.steps:
            click.echo(f"step {step}: loss {loss:.4f}", err=True)

    data = hashlib.sha256(digits.train_images.numpy().tobytes()).hexdigest()
    return train(family, lambda: build_transformer(family, heads), draw, plan, folder, data, report)


def nearest(images: torch.Tensor, others: torch.Tensor) -> float:
    """Return the median L2 distance from each image [B, 16, 16] to the nearest of the others."""
    return torch.cdist(images.flatten(1), others.flatten(1)).min(1).values.median().item()


def measure(directory: Path, family: Family, classifier: nn.Module, digits: Digits) -> dict[str, Any]:
    """Judge the stored BF16 weights, computed in FP32: are the digits recognised, and not mere copies?"""
    labels = torch.arange(EVALUATION_IMAGES) % 10
    model = load_source(directory, torch.float32)
    images = decode(sample(family, DESCRIPTION, model, words_of(labels.tolist()), seed=0))
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


def write_model(directory: Path, family: Family, plan: Plan, heads: int) -> dict[str, Any]:
    """Train both networks, write them with what was measured into ``directory``, and return the latter."""
    digits = load_images()
    classifier = train_classifier(digits, plan.seed)
    train_transformer(digits, family, plan, heads, directory).save_pretrained(directory)
    state = {name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(state, directory / FILE_NAME)
    metrics = measure(directory, family, classifier, digits)
    metrics |= {"training_seed": plan.seed, "training_steps": plan.steps}
    metrics["sha256"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*sorted(directory.glob("*.safetensors")), directory / "config.json")
    }
    text = json.dumps(metrics, indent=2, sort_keys=True) + "\n"
    (directory / METRICS_NAME).write_bytes(text.encode("utf-8"))
    write_description(directory, DESCRIPTION)
    return metrics


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("build/digits"), show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=1900, show_default=True, help="Training steps of 64 images.")
@click.option(
    "--family",
    type=click.Choice(list(FAMILIES)),
    default=FLUX.name,
    show_default=True,
    help="FLUX.1's architecture, or FLUX.2's.",
)
@click.option(
    "--heads",
    type=click.IntRange(1),
    default=COMMON["num_attention_heads"],
    show_default=True,
    help="Attention heads, each 64 wide; another number makes another model, to try a recipe on.",
)
@click.option("--force", is_flag=True, help="Replace an existing output directory.")
def main(output: Path, seed: int, steps: int, family: str, heads: int, force: bool) -> None:
    """Train a digits model and its classifier into a new directory.

    A run that was killed resumes where the same command is given again.

    \b
    Example:
      python examples/digits/train.py -o build/digits
      python examples/digits/train.py -o build/digits-flux2 --family flux2
    """
    started = time.process_time()
    with publishing(output, force) as partial:
        metrics = write_model(partial, FAMILIES[family], Plan(steps, seed, 2e-3, lean=False), heads)
    click.echo(f"{metrics['classifier_held_out_accuracy']:.1%} of held-out digits recognised by the classifier")
    click.echo(f"{metrics['accuracy_bf16']:.1%} of {metrics['accuracy_images']} BF16 samples recognised")
    click.echo(f"{output}: written in {time.process_time() - started:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
