"""Linears as a tree of modules, where blocks that are equal and follow each other are one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["tree"]


@dataclass(frozen=True)
class _Module:
    """A module: the text of the linear that it is ("" for none), and its members."""

    text: str
    members: tuple[tuple[str, _Module], ...]


def tree(linears: Iterable[Mapping[str, Any]], texts: Iterable[str]) -> list[str]:
    """Return the module tree of linears as lines; `texts` says what to write behind each."""
    root: dict[str, Any] = {}
    for linear, text in zip(linears, texts, strict=True):
        branch = root
        for part in linear["path"].split("."):
            branch = branch.setdefault(part, {})
        branch[""] = text
    rows = list(_rows(_module(root), 0))
    width = max((len(label) for label, text in rows if text), default=0)
    return [f"{label:{width}}  {text}" if text else label for label, text in rows]


def _module(branch: Mapping[str, Any]) -> _Module:
    members = [(name, _module(child)) for name, child in branch.items() if name]
    if all(name.isdecimal() for name, _ in members):
        members.sort(key=lambda item: int(item[0]))  # an engine computes blocks in an order of its own
    return _Module(branch.get("", ""), tuple(members))


def _content(module: _Module) -> tuple[str, frozenset[object]]:
    """Return what makes two modules equal, in whatever order their members come."""
    return module.text, frozenset((name, _content(member)) for name, member in module.members)


def _rows(module: _Module, depth: int) -> Iterator[tuple[str, str]]:
    for label, member in _labelled("", module):
        yield "  " * depth + label, member.text
        yield from _rows(member, depth + 1)


def _labelled(prefix: str, module: _Module) -> Iterator[tuple[str, _Module]]:
    """Yield the members; a list of blocks gives its runs, a module of one member takes that one's name on."""
    for first, last, member in _runs(module.members):
        label = f"{prefix}{first}"
        if first != last:
            yield f"{label}-{last} ({int(last) - int(first) + 1} equal blocks)", member
        elif not member.text and (len(member.members) == 1 or _is_list(member)):
            yield from _labelled(f"{label}.", member)
        else:
            yield label, member


def _is_list(module: _Module) -> bool:
    return all(name.isdecimal() for name, _ in module.members)


def _runs(members: Iterable[tuple[str, _Module]]) -> Iterator[tuple[str, str, _Module]]:
    """Yield first name, last name and the module of each run of equal modules with numbers that follow each other."""
    run: tuple[str, str, _Module] | None = None
    for name, module in members:
        if run is not None and _follows(run[1], name) and _content(module) == _content(run[2]):
            run = (run[0], name, module)
            continue
        if run is not None:
            yield run
        run = (name, name, module)
    if run is not None:
        yield run


def _follows(one: str, other: str) -> bool:
    return one.isdecimal() and other.isdecimal() and int(other) == int(one) + 1
