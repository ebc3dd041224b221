"""Names and shapes of a model's tensors, written down module by module."""

from __future__ import annotations

__all__ = ["Shapes"]


class Shapes(dict[str, tuple[int, ...]]):
    """Name to shape of every tensor, in the order in which modules were added."""

    def linear(self, path: str, rows: int, columns: int, bias: bool = True) -> None:
        """Add a linear, weight [rows, columns]."""
        self[f"{path}.weight"] = (rows, columns)
        if bias:
            self[f"{path}.bias"] = (rows,)

    def linears(self, path: str, rows: int, columns: int, *names: str, bias: bool = True) -> None:
        """Add linears of one shape, ``PATH.NAME`` each."""
        for name in names:
            self.linear(f"{path}.{name}", rows, columns, bias)

    def norms(self, path: str, size: int, *names: str) -> None:
        """Add norms that have a weight alone, ``PATH.NAME`` each."""
        for name in names:
            self[f"{path}.{name}.weight"] = (size,)
