"""How many of our files run to take weights from the source to an ONNX graph: what a reader would have to open.

Counts the files of which a function is called by ``quantize`` (from an amax file) and by ``export`` of the built-in
model. Run with ``--root`` on another checkout to compare, and ``--json`` for programs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def files_of(root: Path, call: Callable[[], object]) -> list[str]:
    """Return the files below a folder of which functions are called, by name; not while they are imported."""
    call()
    seen: set[str] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name not in ("<module>", "__getattr__"):
            seen.add(frame.f_code.co_filename)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    inside = (Path(name) for name in seen - {__file__} if name.startswith(f"{root}/"))
    return sorted(path.relative_to(root).as_posix() for path in inside if "site-packages" not in path.parts)


def main(arguments: list[str]) -> None:
    """Print the counts."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--root", type=Path, default=ROOT, help="checkout to run")
    options.add_argument("--json", action="store_true")
    asked = options.parse_args(arguments)
    root = asked.root.resolve()
    sys.path.insert(0, str(root))
    calibration, exporter = importlib.import_module("calibration"), importlib.import_module("exporter")
    with tempfile.TemporaryDirectory() as folder:
        amax, result = Path(folder) / "amax.json", Path(folder) / "digits"
        calibration.calibrate("digits", amax, steps=1)
        recipe = {"recipe": "nvfp4-ptq", "calibration": amax, "force": True}
        found = {
            "quantize": files_of(root, lambda: calibration.quantize("digits", result, **recipe)),
            "export": files_of(root, lambda: exporter.export(result, force=True)),
        }
    if asked.json:
        print(json.dumps(found, indent=1))
        return
    for verb, files in found.items():
        print(f"{verb}: {len(files)} files\n  " + "\n  ".join(files))


if __name__ == "__main__":
    main(sys.argv[1:])
