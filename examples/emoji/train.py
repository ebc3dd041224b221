"""Train a small FLUX transformer that draws emoji from prompts such as "fox face on blue".

One seed, one thread, a fixed number of steps: the same machine and versions give the same bytes, also where the run was
killed and started again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from calibration.inputs.captured import save_inputs
from calibration.pixel_space.description import Classifier, Description, Pixels, Run, Text, write_description
from calibration.pixel_space.latents import decode
from calibration.pixel_space.prompts import embed_prompts
from calibration.pixel_space.sampling import capture, sample
from calibration.pixel_space.training import Batch, Plan, publishing, start_as_identity, train
from fp4trt.families.flux import FLUX
from generation.comparison.digit_classifier import FILE_NAME, accuracy, build_classifier

EMOJI = (
    "🐵🐶🦊🐱🦁🐯🦄🐷🐭🐰🐻🐨🐼🐸🐔🐧🐥🦉🐢🐙🦀🐠🐳🦋🐞🐝🐘🐊🌵🌲🌴🌷"
    "🌻🍀🍄🍅🍆🥕🥦🥑🍇🍉🍊🍋🍌🍍🍎🍐🍒🍓🥝🍔🍟🍕🍿🍩🍰🍦🌞🎃🎁🚀🏀🏠"
)
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (160, 160, 160),
    "pink": (255, 190, 205),
    "yellow": (255, 235, 140),
    "green": (170, 220, 160),
    "blue": (160, 205, 255),
}
FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
DRAWN = (109, 136, 128)
"""The font's only size, and width and height of its bitmaps."""

WORDS, WORD_WIDTH = 8, 64
SIZE = 32
CONFIG = {
    "in_channels": 48,
    "num_layers": 4,
    "num_single_layers": 8,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24),
    "joint_attention_dim": WORD_WIDTH,
    "pooled_projection_dim": WORD_WIDTH,
    "guidance_embeds": True,
}
STEPS = 12
CALIBRATION_RUNS, CALIBRATION_IMAGES = 4, 10
BATCH = 16
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 600, 64
EVALUATION_IMAGES = 192
SHEET = (2, 12)
SHEET_EVERY = 200


@dataclass(frozen=True)
class Emoji:
    """What is learned.

    Attributes:
        pictures: FP32 [N, 4, 64, 64] in [0, 1]: colour times opacity, and opacity.
        names: of the N emoji, as Unicode has them, in lower case.
        colours: of the backgrounds, FP32 [6, 3].
        embedded: tokens [N, 6, words, width] and pooled [N, 6, width] of each name on each background.
        sha256: of pictures and prompts.
    """

    pictures: torch.Tensor
    names: tuple[str, ...]
    colours: torch.Tensor
    embedded: tuple[torch.Tensor, torch.Tensor]
    sha256: str

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """Return random emoji on random backgrounds, moved and scaled a little."""
        return self.labelled(count, generator)[0]

    def labelled(self, count: int, generator: torch.Generator) -> tuple[Batch, torch.Tensor]:
        """Return a batch, and which emoji its images show, int64 [count]."""
        rows = torch.randint(len(self.names), (count,), generator=generator)
        places = torch.randint(len(self.colours), (count,), generator=generator)
        uniform = torch.rand(3, count, generator=generator) * 2 - 1
        scale, shift = 1.05 + 0.06 * uniform[0], 0.06 * uniform[1:]
        none = torch.zeros(count)
        moves = torch.stack([torch.stack([scale, none, shift[0]], -1), torch.stack([none, scale, shift[1]], -1)], 1)
        grid = functional.affine_grid(moves, [len(rows), 4, SIZE, SIZE], align_corners=False)
        moved = functional.grid_sample(self.pictures[rows], grid, align_corners=False)
        images = (moved[:, :3] + (1 - moved[:, 3:]) * self.colours[places][:, :, None, None]).clamp(0, 1)
        return Batch(images, self.embedded[0][rows, places], self.embedded[1][rows, places]), rows


def prompt_of(name: str, background: str) -> str:
    """Return what asks for an emoji."""
    return f"{name} on {background}"


def describe(names: tuple[str, ...]) -> Description:
    """Return how the model is sampled: of all prompts the last ones calibrate, and the others compare."""
    backgrounds, count = list(BACKGROUNDS), len(names)
    order = [(name, (name + turn) % len(backgrounds)) for turn in range(len(backgrounds)) for name in range(count)]
    labels = {prompt_of(names[name], backgrounds[place]): name for name, place in order}
    prompts = tuple(labels)
    kept = len(prompts) - CALIBRATION_RUNS * CALIBRATION_IMAGES
    runs = (prompts[kept + run * CALIBRATION_IMAGES :][:CALIBRATION_IMAGES] for run in range(CALIBRATION_RUNS))
    return Description(
        image=Pixels(size=SIZE, channels=3),
        text=Text(words=WORDS, width=WORD_WIDTH),
        steps=STEPS,
        guidance=3.5,
        prompts=prompts[:kept],
        calibration=tuple(Run(seed=seed, prompts=run) for seed, run in enumerate(runs)),
        classifier=Classifier(file=FILE_NAME, labels=labels),
    )


def find_font(given: Path | None) -> Path:
    """Return the font's file, the given one or an installed package's."""
    for path in [Path(place) for place in FONT_PLACES] if given is None else [given]:
        if path.is_file():
            return path
    if given is not None:
        raise click.UsageError(f"{given} is no file; expected NotoColorEmoji.ttf")
    raise click.UsageError("the font Noto Color Emoji is missing; install fonts-noto-color-emoji, or give --font FILE")


def load_emoji(font: Path, count: int) -> Emoji:
    """Draw the first emoji with a font."""
    size, width, height = DRAWN
    try:
        loaded = ImageFont.truetype(font, size)
    except OSError as error:
        raise click.UsageError(
            f"{font} does not draw at {size} pixels ({error}); expected NotoColorEmoji.ttf"
        ) from None
    pictures, names = [], []
    for symbol in EMOJI[:count]:
        image = Image.new("RGBA", (width, width))
        ImageDraw.Draw(image).text((0, (width - height) // 2), symbol, font=loaded, embedded_color=True)
        small = image.convert("RGBa").resize((2 * SIZE, 2 * SIZE), Image.Resampling.LANCZOS)
        pictures.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(2 * SIZE, 2 * SIZE, 4))
        names.append(unicodedata.name(symbol).lower())
    stacked = torch.stack(pictures)
    prompts = [prompt_of(name, background) for name in names for background in BACKGROUNDS]
    tokens, pooled = embed_prompts(prompts, WORDS, WORD_WIDTH)
    shape = (len(names), len(BACKGROUNDS))
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    digest = hashlib.sha256(stacked.numpy().tobytes() + "\n".join(prompts).encode()).hexdigest()
    embedded = (tokens.view(*shape, WORDS, WORD_WIDTH), pooled.view(*shape, WORD_WIDTH))
    return Emoji(stacked.permute(0, 3, 1, 2) / 255, tuple(names), colours, embedded, digest)


def build_transformer() -> Any:
    """Return the untrained transformer."""
    model: Any = FluxTransformer2DModel(**CONFIG)  # type: ignore[no-untyped-call]
    start_as_identity(model)
    return model


def train_classifier(emoji: Emoji, seed: int) -> nn.Sequential:
    """Train the judge on the emoji themselves, moved and scaled as those that the transformer sees."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = build_classifier(3, SIZE, len(emoji.names)).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, CLASSIFIER_STEPS)
    with click.progressbar(range(CLASSIFIER_STEPS), label="Training the classifier", file=sys.stderr) as steps:
        for _ in steps:
            batch, labels = emoji.labelled(CLASSIFIER_BATCH, generator)
            loss = functional.cross_entropy(classifier(batch.images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return classifier.eval()


def draw(model: Any, described: Description, prompts: tuple[str, ...], seed: int) -> torch.Tensor:
    """Return images of some prompts, FP32 [N, 3, 32, 32]."""
    return decode(sample(FLUX, described, model, prompts, seed), SIZE, SIZE)


def write_sheet(images: torch.Tensor, path: Path) -> None:
    """Write images as one picture, enlarged three times."""
    rows, columns = SHEET
    tiled = images.view(rows, columns, 3, SIZE, SIZE).permute(0, 3, 1, 4, 2).reshape(rows * SIZE, columns * SIZE, 3)
    picture = Image.fromarray((tiled * 255).round().to(torch.uint8).numpy())
    path.parent.mkdir(exist_ok=True)
    picture.resize((3 * columns * SIZE, 3 * rows * SIZE), Image.Resampling.NEAREST).save(path)


def train_transformer(emoji: Emoji, described: Description, plan: Plan, folder: Path) -> Any:
    """Train the transformer, tell loss and time, draw a sheet of samples now and then, and return the BF16 weights."""
    shown = described.prompts[: SHEET[0] * SHEET[1]]

    def report(step: int, loss: float, average: Any) -> None:
        if step % 50 == 0 or step == plan.steps:
            click.echo(f"step {step}: loss {loss:.4f}, {time.process_time():.0f} CPU-seconds", err=True)
        if step % SHEET_EVERY == 0:
            write_sheet(draw(average.eval(), described, shown, seed=0), folder / "samples" / f"{step:05d}.png")

    return train(FLUX, build_transformer, lambda random: emoji.batch(BATCH, random), plan, folder, emoji.sha256, report)


def write_model(folder: Path, emoji: Emoji, plan: Plan) -> dict[str, Any]:
    """Train both networks, write them, how to sample, calibration data and what was measured, and return the latter."""
    described = describe(emoji.names)
    model = train_transformer(emoji, described, plan, folder)
    model.save_pretrained(folder)
    classifier = train_classifier(emoji, plan.seed)
    save_file({name: tensor.contiguous() for name, tensor in classifier.state_dict().items()}, folder / FILE_NAME)
    (folder / "calibration").mkdir(exist_ok=True)
    calls = capture(FLUX, described, model, described.calibration, dtype=torch.bfloat16)
    save_inputs(folder / "calibration" / "inputs.safetensors", calls)
    held_out, labels = emoji.labelled(EVALUATION_IMAGES, torch.Generator().manual_seed(plan.seed + 1))
    prompts = described.prompts[:EVALUATION_IMAGES]
    asked = torch.tensor([described.classifier.labels[prompt] for prompt in prompts])
    metrics = {
        "classifier_accuracy": accuracy(classifier, held_out.images, labels),
        "accuracy_bf16": accuracy(classifier, draw(model.float(), described, prompts, seed=0), asked),
        "accuracy_images": len(prompts),
        "training_seed": plan.seed,
        "training_steps": plan.steps,
        "data_sha256": emoji.sha256,
        "sha256": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))
        },
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_description(folder, described)
    return metrics


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("build/emoji"), show_default=True)
@click.option("--font", type=click.Path(path_type=Path), help="NotoColorEmoji.ttf.  [default: the installed one]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--steps", type=click.IntRange(1), default=4000, show_default=True, help=f"Training steps of {BATCH} images."
)
@click.option(
    "--emoji",
    type=click.IntRange(8, len(EMOJI)),
    default=len(EMOJI),
    show_default=True,
    help="How many emoji to learn.",
)
@click.option("--force", is_flag=True, help="Replace an existing output directory.")
def main(output: Path, font: Path | None, seed: int, steps: int, emoji: int, force: bool) -> None:
    """Train the emoji model and its classifier into a new directory.

    A run that was killed resumes where the same command is given again.

    \b
    Example:
      python examples/emoji/train.py -o build/emoji
    """
    started = time.process_time()
    learned = load_emoji(find_font(font), emoji)
    click.echo(f"{len(learned.names)} emoji on {len(BACKGROUNDS)} backgrounds, SHA-256 {learned.sha256}")
    with publishing(output, force) as partial:
        metrics = write_model(partial, learned, Plan(steps, seed))
    click.echo(f"{metrics['classifier_accuracy']:.1%} of the emoji recognised by the classifier")
    click.echo(f"{metrics['accuracy_bf16']:.1%} of {metrics['accuracy_images']} BF16 samples recognised")
    click.echo(f"weights: SHA-256 {metrics['sha256']['diffusion_pytorch_model.safetensors']}")
    click.echo(f"{output}: written in {time.process_time() - started:.0f} CPU-seconds")


if __name__ == "__main__":
    main()
