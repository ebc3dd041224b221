"""What TensorRT-RTX does with each mutation of docs/lint.md when the lint does not stop it. Takes about ten minutes."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from calibration import quantize  # noqa: E402
from exporter import export  # noqa: E402
from tests.onnx_functions.linting.damage import Damaged  # noqa: E402
from tests.onnx_functions.linting.mutations import MUTATIONS  # noqa: E402
from tests.onnx_functions.linting.table import verdict  # noqa: E402
from trt_build.graph import read_graph  # noqa: E402

RECIPE = {
    "name": "modulation-in-fp8",
    "method": {"name": "ptq"},
    "formats": {"rules": [{"linears": "*.norm*.linear", "format": "fp8"}]},
}


def main(names: list[str]) -> int:
    """Build each mutation, or those named; exit status 1 when the table says otherwise."""
    found, wrong = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        sources = {"fp4": Path(folder) / "digits", "fp8": Path(folder) / "digits-fp8"}
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
        quantize("digits", sources["fp4"], recipe="nvfp4-ptq")
        quantize("digits", sources["fp8"], recipe=recipe)
        for source in sources.values():
            export(source)
        for mutation in MUTATIONS:
            if names and mutation.name not in names:
                continue
            with tempfile.TemporaryDirectory(dir=folder) as place:
                source = sources[mutation.base]
                graph = Damaged.copy(source, Path(place) / "model")
                mutation.apply(graph)
                found[mutation.name] = verdict(graph.save(), read_graph(source))
            differs = found[mutation.name] != mutation.tensorrt
            wrong += differs
            said = f"  (the table says {mutation.tensorrt})" if differs else ""
            print(f"{found[mutation.name]:9} {mutation.rule:28} {mutation.name}{said}", flush=True)
    result = ROOT / "build" / "benchmarks" / "lint_verdicts.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
