"""The commands of this room: `validate`, `lint` and `inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnx_functions.inspection.inspect import Inspected

__all__ = ["inspect", "lint", "validate"]


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Checkpoint to compare with: a quantized one, or a 16-bit one for the quantization error itself. "
    "Default: the checkpoint beside the graph.",
)
@click.option(
    "--level",
    type=click.Choice(["full", "blocks"]),
    default="full",
    show_default=True,
    help="full runs the whole graph too, where it fits into memory; blocks one block at a time only.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for report.json and report.html. Default: validation/ beside the graph.",
)
@click.option("--blocks", metavar="N|PATHS", help="Check N blocks of each stack, or those with these paths.")
@click.option(
    "--tokens", metavar="IMAGE,TEXT", help="Run once with these token counts instead of twice with small default ones."
)
@click.option("--force", is_flag=True, help="Replace files of these names that are no reports of fp4trt.")
def validate(
    model: Path,
    reference: Path | None,
    level: str,
    output: Path | None,
    blocks: str | None,
    tokens: str | None,
    force: bool,
) -> dict[str, Any]:
    """Check the numerics of a graph against its checkpoint, or a third party's graph by itself.

    MODEL is an exported ONNX file, or the folder that holds model.onnx. Exits with 1 when a gate fails; the
    report and the line of that gate name the tensor or node. A graph that lies apart from its checkpoint
    (export --copy-weights) needs --reference. A graph without fp4trt's metadata is run at two sizes: its outputs
    have to be finite and to follow every input; whether they are right, nothing tells. Exits with 1 too where it
    could not be run here, and says so.

    \b
    Example:
      fp4trt validate digits-fp4/
      fp4trt validate flux-fp4/ --level blocks --tokens 512,128
    """
    from fp4trt.pipeline_folder import graph_in
    from onnx_functions.validation.report import NO_PLOTS, report_files
    from onnx_functions.validation.third_party_validation import third_party_graph, validate_third_party

    file = graph_in(model)
    folder = output or file.parent / "validation"
    alone = (reference, level, blocks, tokens) == (None, "full", None, None)
    graph = third_party_graph(file) if alone else None
    if graph is not None:
        report = validate_third_party(file, graph, folder, force, click.echo)
    else:
        from onnx_functions.validation.run_gates import (
            validate as check,  # torch, which a third party's graph does not need
        )

        report = check(
            model,
            reference,
            level=level,
            report_dir=folder,
            force=force,
            say=click.echo,
            blocks=blocks,
            tokens=tokens,
        )
    data, page = report_files(folder)
    failed = ", ".join(gate.name for gate in report.failures)
    if page is None:
        click.echo(NO_PLOTS)
    seen = f"; but {report.note}" if report.note else ""
    verdict = f"validation {'passed' if report.passed else 'FAILED: ' + failed}{seen}"
    if report.not_run is not None:
        verdict = f"no validation: the graph {report.not_run.detail}; nothing is known of its numbers"
    click.echo(f"{verdict}; report in {page or data}")
    html = str(page.resolve()) if page is not None else None
    return {**report.as_dict(), "report": str(data.resolve()), "html": html}


@click.command()
@click.argument("model", metavar="DIR|MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--allow-slow", is_flag=True, help="Report what only loses FP4 speed without refusing it.")
def lint(model: Path, allow_slow: bool) -> dict[str, Any]:
    """Find what TensorRT would accept wrongly or degrade in silence.

    Prints one line for each finding: severity, rule, node, tensor, what was found, how to mend it. Exits with 1 when
    one is refused: every `wrong` one, and every `slow` one without --allow-slow. Needs no torch.

    \b
    Example:
      fp4trt lint flux-fp4/model.onnx
    """
    from onnx_functions.linting import RULES
    from onnx_functions.linting import lint as check

    report = check(model, allow_slow=allow_slow)
    for finding in report.findings:
        click.echo(finding.line())
    click.echo(
        f"{len(RULES)} rules, {len(report.findings)} findings, {len(report.refused)} refused: "
        f"{'passed' if report.passed else 'FAILED'}"
    )
    return report.as_dict()


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--tree", "as_tree", is_flag=True, help="Print each linear at its module, equal blocks once.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The 16-bit checkpoint that ARTIFACT was made of (a folder, a .safetensors file, or digits): prove in which "
    "layout its NVFP4, FP8 and MXFP8 weights are.",
)
def inspect(artifact: Path, as_tree: bool, against: Path | None) -> Inspected:
    """Say what an artifact is: formats, sizes, FP4 coverage, merged groups, promised against found.

    ARTIFACT is a checkpoint folder, any ONNX file, the JSON that lies beside an engine (or the engine), or a picture
    that fp4trt generate wrote. With
    --against it is a quantized checkpoint of any producer, a folder or a .safetensors file; exits with 1 when its
    layout is not proven, or is not the one that fp4trt reads.

    \b
    Example:
      fp4trt inspect flux-fp4/model.onnx
      fp4trt inspect flux-fp4 --tree
      fp4trt inspect flux1-dev-nvfp4.safetensors --against FLUX.1-dev
    """
    from onnx_functions.inspection.inspect import inspect as run
    from onnx_functions.inspection.table import table, tree_table
    from onnx_functions.layouts.detection import lines_of

    found = run(artifact, against=against)
    lines = lines_of if against is not None else tree_table if as_tree else table
    for line in lines(found.as_dict()):
        click.echo(line)
    return found
