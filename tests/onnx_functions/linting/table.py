"""The table of docs/lint.md, and what TensorRT-RTX does with a graph when the lint does not stop it.

`python -m tests.onnx_functions.linting.table` writes the table into docs/lint.md; a test holds the two together.
"""

from __future__ import annotations

from pathlib import Path

from fp4trt.errors import BuildError
from onnx_functions.linting import RULES
from tests.onnx_functions.linting.mutations import MUTATIONS
from trt_build.attention_coverage import measure_attentions
from trt_build.coverage import measure_coverage
from trt_build.graph import Graph, read_graph
from trt_build.layer_info import parse_layers
from trt_build.profiles import make_profile
from trt_build.supervise import run_child

__all__ = ["BEGIN", "END", "page", "table", "verdict"]

BEGIN = "<!-- table: written by tests/onnx_functions/linting/table.py -->"
WHOLE = {0: (30, 52), 8: (24, 44)}
"""Number of linears in FP8 to the FP4 GEMMs of the built-in model's engine, and the linears that these cover."""
SHORT = {0: (13, 20), 3: (10, 17)}
"""The same of the model that is cut to a block of each kind."""
END = "<!-- end of the table -->"


def table() -> list[str]:
    """Return the lines of the table: a rule a row, with its mutations and TensorRT-RTX's verdict on each."""
    lines = ["| rule | severity | why | mutation: what TensorRT-RTX 1.7.1 does |", "|---|---|---|---|"]
    for rule in RULES:
        provoked = [f"{entry.name}: {entry.tensorrt}" for entry in MUTATIONS if entry.rule == rule.name]
        lines.append(f"| `{rule.name}` | {rule.severity} | {rule.why} | {'<br>'.join(provoked)} |")
    return lines


def page(text: str) -> str:
    """Return docs/lint.md with its table renewed."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return "\n".join([before + BEGIN, *table(), END + after])


def verdict(path: Path, untouched: Graph) -> str:
    """Build a mutated graph and return `accepted`, `slow`, `refused` or `crashes`: see its mutations/."""
    graph = read_graph(path)
    profile = make_profile(graph.input_shapes, untouched.symbols, fp8_attention=bool(graph.attentions))
    partial = path.with_name("engine.partial")
    request = {
        "backend": "tensorrt_rtx",
        "onnx": str(path),
        "partial": str(partial),
        "compute_capabilities": ["SM120"],
        "profiles": [{name: [list(shape) for shape in shapes] for name, shapes in profile.inputs.items()}],
        "weight_streaming": False,
    }
    try:
        event = run_child(request, lambda *_: None)
    except BuildError as error:
        return "crashes" if "ended without a result" in str(error) else "refused"
    finally:
        partial.unlink(missing_ok=True)
    layers = parse_layers(event["layers"])
    coverage = measure_coverage(untouched, layers)
    counts = (coverage.fp4_gemms, coverage.fp4_linears)
    fp8 = len(untouched.promised_fp8)
    whole = counts in (WHOLE.get(fp8), SHORT.get(fp8)) and not coverage.lost
    fused = len(measure_attentions(graph, layers).fused) == len(graph.attentions)
    return "accepted" if whole and fused else "slow"


if __name__ == "__main__":
    target = Path(__file__).resolve().parents[3] / "docs" / "lint.md"
    target.write_text(page(target.read_text(encoding="utf-8")), encoding="utf-8")
