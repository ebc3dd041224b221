"""The loop: AdamW with warm-up and cosine, through Accelerate, which knows devices, precision and other processes."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from calibration.by_block import processes
from calibration.inputs.captured import Inputs
from calibration.methods.qat.trajectories import Trajectories
from calibration.recipes.recipe import QAT
from fp4trt.errors import BadCheckpoint, BadRecipe
from fp4trt.families import Family
from fp4trt.families.family import Config
from fp4trt.json_file import load_json
from fp4trt.progress import note, tracking
from fp4trt.publish import write_json

__all__ = ["Losses", "learning_rate", "train"]

_STATE: Final = "state"
_STEPS: Final = "steps.json"
_REST_S: Final = 30.0
"""Between the end of keeping the state and the next time, at least."""

_SHARE: Final = 10
"""And so many times as long as keeping it took."""

Losses = dict[str, list[float]]
"""``velocity``, and ``blocks`` where it counts, of every step; means over the processes."""


@dataclass(frozen=True)
class _Listener:
    """Hears what the blocks of a model return.

    Attributes:
        outputs: of the last call, in the order in which the blocks ran.
    """

    outputs: list[tuple[torch.Tensor, ...]] = field(default_factory=list)

    def attach(self, model: nn.Module, blocks: Sequence[str]) -> None:
        for block in blocks:
            model.get_submodule(block).register_forward_hook(self._hear)

    def _hear(self, _: nn.Module, __: Any, output: Any) -> None:
        self.outputs.append(output if isinstance(output, tuple) else (output,))

    def taken(self) -> list[tuple[torch.Tensor, ...]]:
        """Return what was heard, and forget it: a checkpointed block runs, and is heard, again during the backward."""
        found = list(self.outputs)
        self.outputs.clear()
        return found


def learning_rate(step: int, options: QAT) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine down to 0."""
    warm_up = min(options.warm_up, options.steps)
    if step < warm_up:
        return options.learning_rate * (step + 1) / warm_up
    done = (step - warm_up) / max(1, options.steps - warm_up)
    return options.learning_rate * (1 + math.cos(math.pi * done)) / 2


def train(
    student: nn.Module,
    teacher: nn.Module,
    calls: Sequence[Inputs],
    family: Family,
    config: Config,
    options: QAT,
    work: Path,
    device: str = "cpu",
) -> tuple[dict[str, torch.Tensor], Losses]:
    """Train the student to answer as the teacher does; resume where a killed run had kept its state.

    Args:
        student: of :func:`calibration.methods.qat.student.make_student`; of its parameters, those learn that require a
            gradient.
        teacher: the plain model.
        calls: captured inputs.
        family: of both.
        config: of both.
        options: of the recipe.
        work: folder for the state, the same for all processes.
        device: ``cpu``, or ``cuda`` for whatever Accelerate finds.

    Returns:
        The student's state on the CPU (complete in the main process), and the losses.

    Raises:
        BadRecipe: the batch does not split over the processes.
        BadInputs: the states that the recipe asks for cannot be made.
    """
    loop = _Loop(student, teacher, calls, family, config, options, work, device)
    loop.run()
    return loop.state(), loop.losses


class _Loop:
    """A training run."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        calls: Sequence[Inputs],
        family: Family,
        config: Config,
        options: QAT,
        work: Path,
        device: str,
    ) -> None:
        from accelerate import Accelerator

        if options.batch % processes.count():
            raise BadRecipe(
                f"batch {options.batch} does not split over {processes.count()} processes; expected a multiple of them"
            )
        accelerator: Any = Accelerator(cpu=device == "cpu")
        self._accelerator, self._options, self._work = accelerator, options, work
        precision = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        # Not ModelMixin.to, which warns of what a plain FP32 model need not fear.
        self._teacher = nn.Module.to(teacher, accelerator.device, precision).eval().requires_grad_(False)
        self._heard, self._wanted = _Listener(), _Listener()
        if options.block_loss:
            self._heard.attach(student, family.blocks(config))
            self._wanted.attach(self._teacher, family.blocks(config))
        if options.gradient_checkpointing:
            student.enable_gradient_checkpointing()  # type: ignore[operator]
        student.train()
        self._student = accelerator.prepare(student)
        learning = [parameter for parameter in self._student.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=options.learning_rate, weight_decay=options.weight_decay)
        self._optimizer = accelerator.prepare(optimizer)
        self._data = Trajectories(
            self._answer,
            calls,
            family,
            config,
            batch=options.batch // processes.count(),
            visits=options.visits,
            seed=(options.seed, processes.rank()),
            synthesise=options.data == "trajectories",
        )
        self.losses: Losses = {}
        self._last_kept, self._keeping_took = time.monotonic(), 0.0

    def run(self) -> None:
        """Take every step that is not done."""
        done = self._resume()
        with tracking(self._options.steps, "training") as advance:
            advance(done)
            for step in range(done, self._options.steps):
                loss = self._step(step)
                if processes.is_main():
                    advance(detail="" if loss is None else f"loss {loss:.2e}")
                self._keep(step + 1)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the student's state, gathered from all processes."""
        state: dict[str, torch.Tensor] = self._accelerator.get_state_dict(self._student)
        return {name: value.detach().cpu() for name, value in state.items()}

    def _step(self, step: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, self._options)
        states = self._data.states(step)
        self._wanted.taken()
        if self._options.block_loss:  # the teacher's blocks were heard for other batches
            self._answer(states.inputs)
        wanted = self._wanted.taken()
        self._heard.taken()
        with self._accelerator.autocast():
            answers = self._student(**self._there(states.inputs), return_dict=False)[0]
        parts = {"velocity": nn.functional.mse_loss(answers.float(), states.answers.to(answers.device).float())}
        if self._options.block_loss:
            parts["blocks"] = _feature_loss(self._heard.taken(), wanted)
        loss = parts["velocity"] + self._options.block_loss * parts.get("blocks", torch.zeros(()))
        self._optimizer.zero_grad()
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._student.parameters(), self._options.clip)
        self._optimizer.step()
        for name, value in parts.items():
            mean = self._accelerator.reduce(value.detach(), "mean")
            self.losses.setdefault(name, []).append(float(mean))
        return self.losses["velocity"][-1]

    def _answer(self, inputs: Inputs) -> torch.Tensor:
        """Return the teacher's velocity, FP32 on the CPU."""
        with torch.no_grad(), self._accelerator.autocast():
            answer: torch.Tensor = self._teacher(**self._there(inputs), return_dict=False)[0]
        return answer.float().cpu()

    def _there(self, inputs: Inputs) -> Inputs:
        """Return inputs where, and in what, the models compute; ids and guidance are FP32 anyway."""
        return {name: value.to(self._accelerator.device).float() for name, value in inputs.items()}

    def _keep(self, done: int) -> None:
        """Keep the state after a step, now and then; the main process says when."""
        now = time.monotonic()
        due = now - self._last_kept > max(_REST_S, _SHARE * self._keeping_took) and done < self._options.steps
        if not self._agreed(due):
            return
        partial = self._work / f"{_STATE}.partial"
        self._accelerator.wait_for_everyone()
        # Not as safetensors, which leave out all but one name of a parameter that linears share.
        self._accelerator.save_state(str(partial), safe_serialization=False)
        if processes.is_main():
            write_json(partial / _STEPS, {"done": done, "losses": self.losses})
            old = self._work / f"{_STATE}.old"
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._work / _STATE, old)
            os.replace(partial, self._work / _STATE)
            shutil.rmtree(old, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        self._last_kept = time.monotonic()
        self._keeping_took = self._last_kept - now

    def _agreed(self, due: bool) -> bool:
        from accelerate.utils import broadcast

        if processes.count() == 1:
            return due
        return bool(broadcast(torch.tensor(int(due), device=self._accelerator.device)).item())

    def _resume(self) -> int:
        """Take over what a killed run kept; return how many steps it had done."""
        found = [folder for folder in (self._work / _STATE, self._work / f"{_STATE}.old") if folder.is_dir()]
        if not found:
            return 0
        try:
            kept = load_json(found[0] / _STEPS)
        except BadCheckpoint:
            return 0
        self._accelerator.load_state(str(found[0]))
        self.losses = kept["losses"]
        if processes.is_main():
            note(f"resuming: {kept['done']} of {self._options.steps} steps are done")
        return int(kept["done"])


def _feature_loss(heard: Sequence[Sequence[torch.Tensor]], wanted: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """Return the mean over the blocks' outputs of their squared relative error."""
    pairs = [pair for ours, theirs in zip(heard, wanted, strict=True) for pair in zip(ours, theirs, strict=True)]
    errors = [(one.float() - other.float()).square().mean() / other.float().square().mean() for one, other in pairs]
    return torch.stack(errors).mean()
