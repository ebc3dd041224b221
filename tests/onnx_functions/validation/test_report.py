"""The report: JSON that any reader takes, and one HTML file that needs nothing beside it."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

import onnx_functions
from fp4trt.errors import OutputExists
from onnx_functions.validation.report import check_report_folder, write_report
from onnx_functions.validation.verdict import (
    ByTime,
    Figures,
    Gate,
    OutputPicture,
    Report,
    gate_of_offenders,
    relative_l2,
)


def report(tmp_path: Path) -> Report:
    gates = (
        Gate("weights", True, 0, 0, "all equal"),
        Gate("structure", False, float("inf"), 1e-3, "node <a> & b", ("a",)),
        Gate("second witness", True, 0, 0, "too large", was_skipped=True),
    )
    rows = tuple(
        Figures(f"blocks.{i}.to_q", f"blocks.{i}", output_error=1e-5 * i, structure_error=1e-6) for i in range(12)
    )
    return Report(tmp_path / "model.onnx", tmp_path, "quantized", "full", gates, rows)


def test_the_json_is_strict_and_complete(tmp_path: Path) -> None:
    data, _ = write_report(report(tmp_path), tmp_path / "out")
    found = json.loads(data.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert found["passed"] is False
    assert [gate["name"] for gate in found["gates"]] == ["weights", "structure", "second witness"]
    assert found["gates"][1]["figure"] is None
    assert len(found["linears"]) == 12


def test_the_html_holds_its_plots_and_loads_nothing(tmp_path: Path) -> None:
    _, page = write_report(report(tmp_path), tmp_path / "out")
    assert page is not None
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == text.count('<figure class="plot wide" tabindex="0" role="group" aria-label="') == 3
    assert "node &lt;a&gt; &amp; b" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href"))


def test_the_outputs_and_their_error_by_time_are_in_the_page(tmp_path: Path) -> None:
    import numpy as np

    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    seen = dataclasses.replace(
        report(tmp_path),
        linears=(),
        by_time=ByTime(((1.0, {"<video>": 0.25}), (0.5, {"<video>": float("inf")}))),
        pictures=(OutputPicture("end to end", "relative L2 error 0.25", pixels, pixels[..., 0], pixels[..., 0]),),
    )
    (data, page), (_, again) = (write_report(seen, tmp_path / name) for name in ("one", "two"))
    assert page is not None
    assert again is not None
    text = page.read_text(encoding="utf-8")
    assert text == again.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 3
    assert "<em>not an image</em>" in text
    assert "<th>&lt;video&gt;</th></tr><tr><th>1</th><td class=number>0.25</td></tr><tr><th>0.5</th>" in text
    assert not re.search(r'(src|href)="(?!#|data:)', text.replace("xlink:href", "href"))
    assert text.count('<figure class="plot" tabindex="0" role="group" aria-label="Error of the output') == 1
    found = json.loads(data.read_text(encoding="utf-8"), parse_constant=pytest.fail)["error_by_time"]
    assert [point["errors"] for point in found["points"]] == [{"<video>": 0.25}, {"<video>": None}]


def test_why_there_is_no_error_by_time_is_said(tmp_path: Path) -> None:
    _, page = write_report(
        dataclasses.replace(report(tmp_path), linears=(), by_time=ByTime(left_out="a < b")), tmp_path / "out"
    )
    assert page is not None
    assert "<h2>Error by time</h2><p>Left out: a &lt; b.</p>" in page.read_text(encoding="utf-8")


def test_what_the_gates_cannot_see_stands_in_both_files(tmp_path: Path) -> None:
    noted = dataclasses.replace(report(tmp_path), note="a misread <layout> passes")
    data, page = write_report(noted, tmp_path / "out")
    assert json.loads(data.read_text(encoding="utf-8"))["note"] == "a misread <layout> passes"
    assert page is not None
    assert "<p>A misread &lt;layout&gt; passes.</p>" in page.read_text(encoding="utf-8")


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(report(tmp_path), tmp_path / name)[1] for name in ("one", "two")]
    assert pages[0] is not None
    assert pages[1] is not None
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_the_files_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    data, page = write_report(report(tmp_path), tmp_path / "out")
    assert page is not None
    for path in (data, page):
        assert str(tmp_path) not in path.read_text(encoding="utf-8")
    found = json.loads(data.read_text(encoding="utf-8"))
    assert (found["model"], found["reference"]) == ("model.onnx", tmp_path.name)
    assert report(tmp_path).as_dict()["model"] == str(tmp_path / "model.onnx")


@pytest.mark.slow
def test_an_earlier_report_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    data, page = write_report(report(tmp_path), tmp_path)
    assert page is not None
    write_report(report(tmp_path), tmp_path)
    for path, mine in ((data, '{"passed": true}'), (page, "<!doctype html><p>mine"), (data, "")):
        ours = path.read_bytes()
        path.write_text(mine)
        with pytest.raises(OutputExists, match=rf"{path.name} is not a report of fp4trt; .* --force"):
            check_report_folder(tmp_path)
        assert path.read_text() == mine
        write_report(report(tmp_path), tmp_path, force=True)
        assert path.read_bytes() == ours


def test_checking_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    check_report_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_infinite_error_is_drawn_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = tuple(
        Figures(f"b.{i}.q", f"b.{i}", output_error=value) for i, value in enumerate((float("inf"), float("nan")))
    )
    write_report(dataclasses.replace(report(tmp_path), linears=rows), tmp_path / "out")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_full_disk_is_named_by_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_report(report(tmp_path), tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out" / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_json_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    data, page = write_report(report(tmp_path), tmp_path / "out")
    assert page is None
    assert data.exists()


def test_a_gate_names_five_offenders_and_counts_the_rest() -> None:
    gate = gate_of_offenders("weights", [(f"w{i}", "differs") for i in range(7)], 7, 0, "", count=9)
    assert not gate.passed
    assert "w4: differs; and 2 more" in gate.detail
    assert len(gate.offenders) == 7


def test_a_relative_error_of_other_shapes_or_of_nan_is_infinite() -> None:
    import numpy as np

    ones = np.ones(4, np.float32)
    assert relative_l2(ones, np.ones(3, np.float32)) == float("inf")
    assert relative_l2(ones * np.nan, ones) == float("inf")
    assert relative_l2(ones * 1.5, ones) == pytest.approx(0.5)


def test_the_verbs_are_functions_whatever_was_imported_before() -> None:
    for module in ("simulation", "validation"):
        importlib.import_module(f"onnx_functions.{module}")
    assert callable(onnx_functions.validate)
    assert callable(onnx_functions.simulate)
    assert callable(onnx_functions.session)
