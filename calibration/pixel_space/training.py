"""Train a pixel-space model with rectified flow: one seed gives the same bytes, also where it was killed in between."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from calibration.pixel_space.latents import encode
from calibration.pixel_space.sampling import in_types, with_positions
from fp4trt.families import Family
from fp4trt.progress import note, tracking

__all__ = ["Batch", "Plan", "publishing", "start_as_identity", "train"]

STATE: Final = "training.pt"
_GUIDANCE: Final = (1.0, 5.0)


@dataclass(frozen=True)
class Batch:
    """What one training step is shown.

    Attributes:
        images: FP32 [B, C, H, W] in [0, 1].
        tokens: the prompts, FP32 [B, T, D].
        pooled: the prompts, FP32 [B, D].
    """

    images: torch.Tensor
    tokens: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        steps: of the optimizer, AdamW.
        seed: of the first weights, the noise and the choice of images.
        learning_rate: the highest; linear warm-up, flat, then a cosine to zero.
        warm_up: steps of the warm-up.
        flat: share of the steps up to which the rate is flat.
        average: decay of the weights' moving average, which is the result.
        lean: compute all in BF16, a copy of the FP32 weights included, and let the optimizer be one kernel. False
            leaves normalisations to autocast in FP32, and computes attention by torch's choice.
        keep_every: steps between two states on disk.
    """

    steps: int
    seed: int = 0
    learning_rate: float = 1e-3
    warm_up: int = 100
    flat: float = 0.3
    average: float = 0.998
    lean: bool = True
    keep_every: int = 50

    def rate_at(self, step: int) -> float:
        """Return the factor on the learning rate."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        done = max(0.0, step / self.steps - self.flat) / (1 - self.flat)
        return 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def publishing(output: Path, force: bool) -> Iterator[Path]:
    """Give a folder to train in, on one thread and repeatably, that becomes ``output`` when nothing was raised.

    Where something was, or the process was killed, it stays, and :func:`train` resumes in it.

    Raises:
        click.UsageError: the output is there already and ``force`` was not given.
    """
    if output.exists() and not force:
        raise click.UsageError(f"{output} exists: give another --output, or --force to replace it")
    # One thread, or the order of the sums, and with it the bytes, would depend on the machine's cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    partial = output.with_name(output.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    yield partial
    (partial / STATE).unlink()
    if output.exists():
        shutil.rmtree(output)
    partial.replace(output)


def start_as_identity(model: nn.Module) -> None:
    """Zero modulations and output of a new transformer, so that every block starts as the identity."""
    for name, parameter in model.named_parameters():
        modulation = ("norm" in name or "modulation" in name) and ".linear." in name
        if modulation or name.startswith("proj_out."):
            nn.init.zeros_(parameter)


def train(
    family: Family,
    build: Callable[[], Any],
    draw: Callable[[torch.Generator], Batch],
    plan: Plan,
    folder: Path,
    data: str,
    report: Callable[[int, float, Any], None],
) -> Any:
    """Train a transformer and return the moving average of its weights, rounded to BF16, in eval mode.

    Args:
        family: of the transformer.
        build: returns it untrained, with FP32 weights.
        draw: (generator) to the next batch.
        plan: how to train.
        folder: exists; holds the state from which a later call goes on.
        data: what tells these images and prompts from any other, such as a hash.
        report: called after each step with its number from 1, its loss and the FP32 average.
    """
    torch.manual_seed(plan.seed)
    model = build()
    run = _Run(family, model, plan, folder / STATE, _identity(model, plan, data))
    run.resume()
    with tracking(plan.steps, "Training the transformer") as advance:
        advance(run.step)
        while run.step < plan.steps:
            loss = run.advance(draw)
            if run.step % plan.keep_every == 0 or run.step == plan.steps:
                run.keep()
            report(run.step, loss, run.average)
            advance(1, f"loss {loss:.4f}")
    result = run.average
    for parameter in result.parameters():
        parameter.data = parameter.data.bfloat16()
    return result.eval()


def _identity(model: Any, plan: Plan, data: str) -> str:
    parts = [asdict(plan), {name: list(each.shape) for name, each in model.named_parameters()}, data, torch.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Run:
    """Training between two steps: weights, their average, the optimizer's moments and the random numbers."""

    def __init__(self, family: Family, model: Any, plan: Plan, path: Path, identity: str) -> None:
        self.step = 0
        self.average = copy.deepcopy(model).requires_grad_(False)
        self._model, self._family, self._plan = model.train(), family, plan
        self._path, self._identity = path, identity
        self._generator = torch.Generator().manual_seed(plan.seed)
        self._optimizer = torch.optim.AdamW(
            model.parameters(), plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=plan.lean or None
        )
        self._copy = copy.deepcopy(model).bfloat16() if plan.lean else None

    def resume(self) -> None:
        """Go on from the state on disk, if there is one of this very training."""
        try:
            state = torch.load(self._path, weights_only=True)
        except (FileNotFoundError, EOFError, RuntimeError, pickle.UnpicklingError):
            return
        if state["identity"] != self._identity:
            return
        self.step = state["step"]
        self._model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"].clone())
        self._refresh()
        note(f"resuming after step {self.step}")

    def keep(self) -> None:
        """Write the state, in place of the last one."""
        partial = self._path.with_name(self._path.name + ".partial")
        state = {
            "identity": self._identity,
            "step": self.step,
            "model": self._model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }
        torch.save(state, partial)
        os.replace(partial, self._path)

    def advance(self, draw: Callable[[torch.Generator], Batch]) -> float:
        """Make one step and return its loss."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.learning_rate * self._plan.rate_at(self.step)
        loss = self._loss(draw(self._generator))
        self._optimizer.zero_grad()
        loss.backward()
        if self._copy is not None:
            for master, worked in zip(self._model.parameters(), self._copy.parameters(), strict=True):
                master.grad, worked.grad = worked.grad.float(), None
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._refresh()
        # A smaller decay at the start: the average may not lag while the weights still move fast.
        decay = min(self._plan.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for kept, current in zip(self.average.parameters(), self._model.parameters(), strict=True):
                kept.lerp_(current, 1 - decay)
        self.step += 1
        return loss.item()

    def _loss(self, batch: Batch) -> torch.Tensor:
        """Return the rectified-flow loss: target noise - image, logit-normal times."""
        clean, count = encode(batch.images), len(batch.images)
        noise = torch.randn(clean.shape, generator=self._generator)
        times = torch.sigmoid(torch.randn(count, generator=self._generator))
        guidance = _GUIDANCE[0] + (_GUIDANCE[1] - _GUIDANCE[0]) * torch.rand(count, generator=self._generator)
        values = {
            "hidden_states": clean + times[:, None, None] * (noise - clean),
            "encoder_hidden_states": batch.tokens,
            "pooled_projections": batch.pooled,
            "timestep": times,
            "guidance": guidance,
        }
        velocity = self._velocity(with_positions(self._family, values))
        return functional.mse_loss(velocity.float(), noise - clean)

    def _velocity(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self._copy is None:
            with torch.autocast("cpu", torch.bfloat16):
                return self._model(**inputs, return_dict=False)[0]
        # The gradient of the fused attention is several times slower at so few tokens.
        with sdpa_kernel(SDPBackend.MATH):
            return self._copy(**in_types(self._family, inputs, torch.bfloat16), return_dict=False)[0]

    def _refresh(self) -> None:
        """Give the BF16 copy the weights."""
        if self._copy is not None:
            with torch.no_grad():
                for worked, master in zip(self._copy.parameters(), self._model.parameters(), strict=True):
                    worked.copy_(master)
