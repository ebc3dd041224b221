"""The table of models in docs/models.md: every small model in every format, as far as it goes.

`python -m tests.frame.models_table` takes half an hour and writes docs/models.json after each cell, then the table. A
cell that is there is kept; `--again` makes those of some models anew, with `--formats` only those in some formats.
Cells are of small models of the diffusers classes: quantized (NVFP4 by nvfp4-quality, FP8 and MXFP8 by rounding),
exported, linted without a finding, validated with every gate, built, with all linears covered. What does not go so far
raises.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

import exporter
import fp4trt
import onnx_functions
import trt_build
from calibration import quantize
from calibration.inputs.captured import save_inputs
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from tests import traced_once
from tests.frame.diffusers_models import MODELS

DOCS: Final = Path(fp4trt.__file__).parents[1] / "docs"
TABLE: Final = DOCS / "models.json"
GUIDE: Final = DOCS / "models.md"
BEGIN, END = "<!-- table of models -->\n", "<!-- end of the table of models -->\n"

RECIPES: Final = {"bf16": None, "nvfp4": "nvfp4-quality", "fp8": "fp8-ptq", "mxfp8": "mxfp8-ptq"}
GPUS: Final = {"bf16": ("rtx5090", "rtx4090"), "nvfp4": ("rtx5090",)}
TO_BE_EXPECTED: Final = {"mxfp8-storage"}
"""Findings of lint: an RTX engine stores MXFP8 and multiplies in BF16."""

Cell = dict[str, Any]


def cell(name: str, kind: str, folder: Path) -> Cell:
    """Take a small model the whole road in a format; return what is counted, by GPU.

    Raises:
        AssertionError: a verdict on the way is not what it has to be.
    """
    source, inputs, result = folder / name, folder / f"{name}.safetensors", folder / f"{name}-{kind}"
    family, config = family_of(load_json(source / "config.json")), load_json(source / "config.json")
    if kind == "bf16":
        graph: Path = exporter.export(source, result / "model.onnx", precision="bf16").onnx
        report = onnx_functions.validate(graph, reference=source)
    else:
        quantize(source, result, recipe=RECIPES[kind], calibration=inputs)
        graph = exporter.export(result).onnx
        report = onnx_functions.validate(result)
    findings = {finding.rule for finding in onnx_functions.lint(graph).findings}
    assert findings <= TO_BE_EXPECTED, f"{name} in {kind}: {findings}"
    assert report.passed, f"{name} in {kind}: {[gate.line for gate in report.failures]}"
    found: Cell = {"linears": len(family.quantized(config)), "groups": len(family.groups(config))}
    for gpu in GPUS.get(kind, ("rtx5090", "rtx4090")):
        engine = trt_build.build(graph, gpu=gpu, output=folder / f"{name}-{kind}-{gpu}.engine")
        assert engine["lost"] == [], f"{name} in {kind} on {gpu}: {engine['lost']}"
        found[gpu] = {"gemms": engine.get(f"{_gemm(kind)}_gemms", 0), "kernels": engine["kernels"]}
    return found


def _gemm(kind: str) -> str:
    return {"nvfp4": "fp4"}.get(kind, kind)


def table(cells: Mapping[str, Mapping[str, Cell]]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| small model of | linears in groups | NVFP4, SM120 | FP8, SM120 | FP8, SM89 | BF16 | MXFP8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, formats in cells.items():
        nvfp4 = formats["nvfp4"]
        engines = [nvfp4["rtx5090"], *(formats["fp8"][gpu] for gpu in ("rtx5090", "rtx4090"))]
        counted = [f"{each['gemms']} GEMMs, {each['kernels']} kernels" for each in engines]
        counted += [f"{formats[kind]['rtx5090']['kernels']} kernels" for kind in ("bf16", "mxfp8")]
        lines.append(f"| `{name}` | {nvfp4['linears']} in {nvfp4['groups']} | {' | '.join(counted)} |")
    return "\n".join(lines) + "\n"


def written_into(guide: str, made: str) -> str:
    """Return the guide with the table in its place."""
    before, _, rest = guide.partition(BEGIN)
    return f"{before}{BEGIN}{made}{END}{rest.partition(END)[2]}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--again", nargs="*", default=[], choices=MODELS, metavar="MODEL")
    options.add_argument("--formats", nargs="+", default=list(RECIPES), choices=RECIPES)
    chosen = options.parse_args()
    traced_once.share_traces()
    known: dict[str, dict[str, Cell]] = load_json(TABLE) if TABLE.exists() else {}
    again = {(name, kind) for name in chosen.again for kind in chosen.formats}
    cells = {
        name: {kind: found for kind, found in known.get(name, {}).items() if (name, kind) not in again}
        for name in MODELS
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, model in MODELS.items():
            if set(cells[name]) == set(RECIPES):
                continue
            model.save(folder / name)
            config = load_json(folder / name / "config.json")
            sizes = ((1, 36, 8), (1, 16, 8), (2, 16, 5))
            calls = [family_of(config).example_inputs(config, size, 7, torch.bfloat16) for size in sizes]
            save_inputs(folder / f"{name}.safetensors", calls)
            for kind in RECIPES:
                if kind not in cells[name]:
                    found = {**cells[name], kind: cell(name, kind, folder)}
                    cells[name] = {each: found[each] for each in RECIPES if each in found}
                    print(f"{name} in {kind}: {cells[name][kind]}", file=sys.stderr)
                    TABLE.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    GUIDE.write_text(written_into(GUIDE.read_text(encoding="utf-8"), table(cells)), encoding="utf-8")


if __name__ == "__main__":
    main()
