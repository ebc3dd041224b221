"""How crowded the house is: floors and arrows of each room, and how far formats and families spread.

A unit is a file that lies in a room, or a sub-package with all that is in it. A unit's floor is one above the highest
unit of its room that it imports. An arrow is an import from one unit to another, counted once.

Run with ``--root`` on another checkout to compare, and ``--json`` for programs.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fp4trt", "calibration", "exporter", "onnx_functions", "trt_build", "generation")
FORMAT = re.compile(r"""["'](?:nvfp4|fp8|mxfp8)["']""")
FAMILY = re.compile(r"flux|FLUX|Flux")


@dataclass(frozen=True)
class House:
    """The modules of a checkout and what each imports of the others.

    Attributes:
        files: dotted name to file.
        imports: dotted name to the dotted names that it imports, wherever the import stands in it.
    """

    files: Mapping[str, Path]
    imports: Mapping[str, frozenset[str]]

    def unit(self, module: str) -> str:
        """Return the unit that a module belongs to."""
        package = module if self.files[module].name == "__init__.py" else module.rpartition(".")[0]
        return module if package == module.partition(".")[0] else ".".join(package.split(".")[:2])

    @functools.cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Unit to the other units that it imports."""
        found: dict[str, set[str]] = defaultdict(set)
        for module, imported in self.imports.items():
            found[self.unit(module)] |= {self.unit(name) for name in imported} - {self.unit(module)}
        return dict(found)

    def inside(self, unit: str) -> set[str]:
        """Return the units of its own room that a unit imports."""
        room = unit.partition(".")[0]
        return {name for name in self.arrows.get(unit, ()) if name.partition(".")[0] == room}

    def circles(self) -> list[str]:
        """Return the units that import themselves by way of others."""

        def reached(unit: str) -> set[str]:
            seen: set[str] = set()
            waiting = list(self.arrows.get(unit, ()))
            while waiting:
                name = waiting.pop()
                if name not in seen:
                    seen.add(name)
                    waiting += self.arrows.get(name, ())
            return seen

        return sorted(unit for unit in self.arrows if unit in reached(unit))

    def floor(self, unit: str) -> int:
        """Return the floor of a unit in its room, from 1; the house must have no circle."""
        return 1 + max((self.floor(name) for name in self.inside(unit)), default=0)


def read_house(root: Path) -> House:
    """Return the house of a checkout."""
    files = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            files[name.removesuffix(".__init__")] = path
    imports = {name: frozenset(_imported(path, files)) for name, path in files.items()}
    return House(files, imports)


def _imported(path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name in files or node.module in files:
                    yield name if name in files else node.module


def counts(root: Path) -> dict[str, Any]:
    """Return the figures of a checkout."""
    house = read_house(root)
    texts = {name: path.read_text(encoding="utf-8") for name, path in house.files.items()}
    circles = house.circles()
    rooms = {}
    for room in ROOMS:
        modules = [name for name in texts if name.partition(".")[0] == room]
        units = sorted({house.unit(name) for name in modules} - {room})
        rooms[room] = {
            "modules": len(modules),
            "lines": sum(texts[name].count("\n") for name in modules),
            "units": len(units),
            "floors": None if circles else max((house.floor(unit) for unit in units), default=0),
            "arrows": sum(len(house.inside(unit)) for unit in units),
        }
    return {
        "rooms": rooms,
        "modules": len(texts),
        "lines": sum(text.count("\n") for text in texts.values()),
        "circles": circles,
        "files_naming_a_format": sum(1 for text in texts.values() if FORMAT.search(text)),
        "files_naming_a_family": sum(1 for text in texts.values() if FAMILY.search(text)),
    }


def table(found: Mapping[str, Any]) -> str:
    """Return the figures for people."""
    rows = [("room", "modules", "lines", "units", "floors", "arrows")]
    for room, row in found["rooms"].items():
        rows.append((room, *("-" if value is None else f"{value:,}" for value in row.values())))
    lines = [f"{name:<15}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    circles = ", ".join(found["circles"]) or "none"
    lines += ["", f"{found['modules']} modules, {found['lines']:,} lines; circles: {circles}"]
    lines.append(f"files naming a format: {found['files_naming_a_format']}; a family: {found['files_naming_a_family']}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=ROOT, help="A checkout; this one by default.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    asked = parser.parse_args(arguments)
    found = counts(asked.root)
    print(json.dumps(found, indent=1) if asked.json else table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
