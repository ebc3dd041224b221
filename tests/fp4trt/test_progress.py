"""Progress goes up, and a bar begins once for a piece of work."""

from __future__ import annotations

import pytest

from fp4trt.progress import Step, on_terminal, reporting, tracking


def test_a_callback_is_told_of_each_step_once_and_upwards() -> None:
    steps: list[Step] = []
    with reporting(steps.append), tracking(3, "packing") as advance:
        for count in (0, 0, 1, 0, 2):
            advance(count)
        advance(0, "sealed")
    assert [(step.done, step.detail) for step in steps] == [(0, ""), (1, ""), (3, ""), (3, "sealed")]


def test_a_stderr_that_is_no_terminal_gets_one_line_for_a_piece_of_work(capfd: pytest.CaptureFixture[str]) -> None:
    with on_terminal():
        for _ in range(2):
            with tracking(3, "packing") as advance:
                for count in (0, 0, 1, 0, 2):
                    advance(count)
    assert capfd.readouterr().err.split() == ["packing", "packing"]
