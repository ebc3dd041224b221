"""Former place of :mod:`fp4trt.file_kind`."""

from __future__ import annotations

from fp4trt.file_kind import what_it_is, what_it_lacks

__all__ = ["what_it_is", "what_it_lacks"]
