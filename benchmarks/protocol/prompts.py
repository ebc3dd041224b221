"""The prompts to draw, one a line or MJHQ-30K's meta_data.json: which of them, and each from which noise.

The choice and the noise are those of deepcompressor's public code, so that as many prompts of MJHQ-30K are the same
prompts, drawn from the same noise: the names are shuffled by ``random.Random(0)``, the first COUNT are taken, and the
seed of an image is a hash of its name.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.inputs.prompts import read_prompts
from fp4trt.errors import BadInputs
from fp4trt.json_file import load_json
from fp4trt.progress import note

MJHQ = 'MJHQ-30K\'s meta_data.json, {name: {"prompt": ...}}'
_PRIME = 10**9 + 7


@dataclass(frozen=True)
class Asked:
    """An image to draw.

    Attributes:
        name: its key in meta_data.json; the prompt itself of a text file.
        prompt: what to draw.
    """

    name: str
    prompt: str

    @property
    def seed(self) -> int:
        """Seed of the noise: the polynomial hash, base 31, of the name."""
        return functools.reduce(lambda value, letter: (value * 31 + ord(letter)) % _PRIME, self.name, 0)

    @property
    def stem(self) -> str:
        """What files that belong to it are called."""
        return f"{self.text_hash}-{self.seed}"

    @property
    def text_hash(self) -> str:
        """What tells its prompt from others."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Choice:
    """Some prompts of a file.

    Attributes:
        asked: those to evaluate on, in the order of the file.
        spare: the others, those first that a larger count takes last; none has the text of one that is evaluated.
        file: name of the file.
        total: how many it holds.
        is_mjhq: whether it is a meta_data.json.
    """

    asked: tuple[Asked, ...]
    spare: tuple[Asked, ...]
    file: str
    total: int
    is_mjhq: bool


def chosen(path: Path, count: int | None) -> Choice:
    """Return the prompts of a file to evaluate on, and those that are left; None takes all.

    Raises:
        BadInputs: the file holds no prompts, or fewer than that.
    """
    is_mjhq = path.suffix == ".json"
    found = _of_json(load_json(path, MJHQ, BadInputs), path) if is_mjhq else _of_lines(path)
    if count is not None and count > len(found):
        raise BadInputs(f"{path} holds {len(found)} prompts, and --count asks for {count}; expected at most as many")
    order = list(range(len(found)))
    random.Random(0).shuffle(order)
    taken = order if count is None else order[:count]
    asked = tuple(found[index] for index in sorted(taken))
    texts = {one.prompt for one in asked}
    rest = (found[index] for index in reversed(order[len(taken) :]))
    return Choice(asked, tuple(one for one in rest if one.prompt not in texts), path.name, len(found), is_mjhq)


def _of_lines(path: Path) -> Sequence[Asked]:
    lines = read_prompts(path)
    once = list(dict.fromkeys(lines))
    if len(once) < len(lines):
        note(f"{path}: {len(lines) - len(once)} lines repeat an earlier one and are left out")
    return [Asked(line, line) for line in once]


def _of_json(value: dict[str, Any], path: Path) -> Sequence[Asked]:
    if not value:
        raise BadInputs(f"{path} holds no prompt; expected {MJHQ}")
    for name, entry in value.items():
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise BadInputs(f"{path}: {name!r} has no prompt; expected {MJHQ}")
    return [Asked(name, entry["prompt"]) for name, entry in value.items()]
