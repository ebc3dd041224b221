"""Run a deployable graph in ONNX Runtime, on its own bytes."""

from __future__ import annotations

from onnx_functions.simulation.simulate import runtime_session, session, simulate

__all__ = ["runtime_session", "session", "simulate"]
