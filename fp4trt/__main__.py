"""``python -m fp4trt``."""

from __future__ import annotations

from fp4trt.cli import main

if __name__ == "__main__":
    main()
