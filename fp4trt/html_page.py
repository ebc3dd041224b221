"""The pages that reports are written as: one HTML file with its own style, which loads nothing from anywhere."""

from __future__ import annotations

import html
import re
from typing import Final

__all__ = ["head", "inline_svg", "page", "plot", "scrolling"]

_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE: Final = """
:root { color-scheme: light dark; --text: #222; --page: #fff; --faint: #666; --line: #ddd; --good: #176b2c;
  --bad: #b00020; --accent: #0b66c3 }
@media (prefers-color-scheme: dark) { :root { --text: #e4e4e4; --page: #16181b; --faint: #a2a2a2; --line: #3c4046;
  --good: #6fd08c; --bad: #ff8a94; --accent: #6cb2ff } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 1.5em auto; padding: 0 1em;
  color: var(--text); background: var(--page); overflow-wrap: break-word; -webkit-text-size-adjust: 100% }
table { border-collapse: collapse; width: 100% } .scroll { overflow-x: auto; margin: 1em 0 }
td, th { border-bottom: 1px solid var(--line); padding: .35em .6em; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } td.number { white-space: nowrap } small, .skipped { color: var(--faint) }
.better, .passed { color: var(--good) } .worse { color: var(--bad) } .failed { color: var(--bad); font-weight: 600 }
code { font-size: .92em; overflow-wrap: anywhere } td code { overflow-wrap: normal }
figure { margin: 1.5em 0 } .plot svg { max-width: 100%; height: auto; fill: currentColor }
.plot { overflow-x: auto } .plot.wide svg { min-width: 640px }
.plot:focus-visible, .scroll:focus-visible { outline: 3px solid var(--accent) }
summary { cursor: pointer; padding: .4em 0 }
"""

_ID: Final = re.compile(r' id="([^"]*)"')
_NAMESPACES: Final = re.compile(r' xmlns(:\w+)?="[^"]*"')


def head(generator: str) -> str:
    """Return how a page of a command begins, by which the command knows its own pages again."""
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" content="{generator}">'


def page(generator: str, title: str, body: str, *, style: str = "", script: str = "") -> str:
    """Return a whole page; its policy forbids every request.

    Args:
        generator: the command that writes it, such as `fp4trt compare`.
        title: plain text.
        body: HTML.
        style: CSS beside that of all pages.
        script: JavaScript that runs when the body is there.
    """
    code = f"<script>{script}</script>" if script else ""
    return (
        f'{head(generator)}<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style><body>{body}{code}</body></html>\n"
    )


def scrolling(table: str) -> str:
    """Return a table that scrolls sideways by itself where the screen is narrower."""
    return f'<div class="scroll" tabindex="0" role="group" aria-label="table">{table}</div>'


def plot(svg: str, label: str, *, wide: bool = False) -> str:
    """Return a plot of matplotlib as a figure that scrolls sideways by itself, by the keyboard too.

    Args:
        svg: as matplotlib saves it, transparent.
        label: what the plot shows, for those who do not see it.
        wide: keep it legible, and wider than a phone, rather than have it as narrow as the screen.
    """
    kind = "plot wide" if wide else "plot"
    told = html.escape(label)
    return f'<figure class="{kind}" tabindex="0" role="group" aria-label="{told}">{inline_svg(svg, label)}</figure>'


def inline_svg(svg: str, label: str) -> str:
    """Return a plot of matplotlib as part of a page: black follows the page's text, and unused ids are gone.

    Args:
        svg: as matplotlib saves it, transparent.
        label: what the plot shows, for those who do not see it.
    """
    text = _NAMESPACES.sub("", svg[svg.index("<svg") :]).replace("#000000", "currentColor")
    used = set(re.findall(r"#([\w.-]+)", text))
    text = _ID.sub(lambda found: found[0] if found[1] in used else "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
