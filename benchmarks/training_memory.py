"""Memory of a training step by what learns: all weights, the biases, or the low-rank branches and the biases.

One double and one single block of FLUX.1's architecture, random weights, width 1024 (`--size` asks for another). Each
row is a process of its own that loads the start, makes student and teacher and trains two steps of one image, as
`fp4trt quantize` does; the start was quantized before. "trained" counts the values with a gradient, "state" the bytes
of masters, gradients and AdamW's state.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from measure.checkpoints import Size, plain_with_inputs
from measure.child import fp4trt, itself
from measure.result import machine, publish

PLAIN = {"name": "plain", "method": {"name": "ptq"}}
BRANCHED = {
    "name": "branched",
    "method": {
        "name": "quality", "rank": 32, "shift_fold": False, "smooth_fold": False, "gptq": False, "descent_sweeps": 0,
        "wiener": 0, "bias_correction": False, "sequential": False,
    },
}  # fmt: skip
STARTS: dict[str, dict[str, Any]] = {"all": PLAIN, "biases": PLAIN, "branch": BRANCHED}


def train(learn: str, start: Path, source: Path, inputs: Path, work: Path) -> dict[str, int]:
    """Train two steps; return how many values learn, and of how many parameters."""
    import functools

    import torch

    from calibration.checkpoints.plain import load_source, open_plain
    from calibration.checkpoints.quantized import read
    from calibration.inputs.captured import load_inputs
    from calibration.methods.qat import training
    from calibration.methods.qat.student import make_student
    from calibration.recipes.recipe import QAT

    options = QAT.model_validate(
        {"name": "qat", "learn": learn, "steps": 2, "learning_rate": 1e-5, "batch": 1, "data": "captured", "visits": 2}
    )
    checkpoint = read(start)
    student = make_student(checkpoint, functools.partial(open_plain(source).tensor, dtype=torch.float32), options.learn)
    teacher = load_source(source, torch.float32)
    training.train(student, teacher, load_inputs(inputs), checkpoint.family, checkpoint.config, options, work)
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    return {"trained": trained, "of": sum(parameter.numel() for parameter in teacher.parameters())}


def measure(learn: str, source: Path, inputs: Path, folder: Path) -> dict[str, Any]:
    recipe, start = folder / f"{STARTS[learn]['name']}.yaml", folder / STARTS[learn]["name"]
    recipe.write_text(json.dumps(STARTS[learn]), encoding="utf-8")
    if not start.exists():
        fp4trt("quantize", source, "-o", start, "--recipe", recipe, "--calibration", inputs)
    cost = itself("--train", learn, start, source, inputs, folder / f"{learn}.work")
    trained, parameters = cost.answer["trained"], cost.answer["of"]
    return {
        "learn": learn,
        "trained": f"{trained / 1e6:.2f} M of {parameters / 1e6:.1f} M",
        "state, MB": 16 * trained / 1e6,
        "peak RSS, MB": cost.peak_rss / 1e6,
        "core-s": cost.core_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=Size.parse, default=Size.parse("1+1x8"), metavar="DOUBLE+SINGLExHEADS")
    parser.add_argument("--tokens", default="64,32", metavar="IMAGE,TEXT")
    parser.add_argument("--folder", type=Path, help="on which disk to work")
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        learn, *paths = options.train
        print(json.dumps(train(learn, *map(Path, paths))))
        return
    before = machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        source, inputs = plain_with_inputs(Path(made), options.size, 2, options.tokens)
        rows = [measure(learn, source, inputs, Path(made)) for learn in STARTS]
    publish(
        "training_memory",
        rows,
        [f"{options.size}, {options.tokens} tokens, FP32; the teacher's weights included."],
        before,
    )


if __name__ == "__main__":
    main()
