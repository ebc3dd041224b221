"""Pictures of two origins one over the other, with a slider between them and their amplified difference."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["PICTURE_SCRIPT", "PICTURE_STYLE", "Other", "Pictured", "data_uri", "picture_section"]

_FACTORS: Final = (1, 2, 4, 8, 16, 32)
_FIRST_FACTOR: Final = 3

PICTURE_STYLE: Final = """
.controls { border: 1px solid var(--line); border-radius: 8px; padding: .5em .8em; margin: 1em 0; display: flex;
  flex-wrap: wrap; gap: .3em 1.2em; align-items: center } .controls label { padding: .35em 0; white-space: nowrap }
.controls input { accent-color: var(--accent); vertical-align: middle } .controls [type=radio] { width: 1.2em;
  height: 1.2em } .cards { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px),
  1fr)) } .cards.tiny { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) } .tiny img { image-rendering:
  pixelated } .card { margin: 0; min-width: 0 } .card figcaption { font-size: .9em; margin-top: .3em }
.stage { position: relative; overflow: hidden; background: #000; --at: 50% }
.stage img { position: absolute; inset: 0; width: 100%; height: 100%; display: block }
.stage .after { clip-path: inset(0 0 0 var(--at)) } .stage .difference { visibility: hidden; filter: var(--amplify) }
.stage::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 0 1px #0008; pointer-events: none }
.wipe { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize;
  touch-action: pan-y } .wipe::-webkit-slider-thumb { width: 1px } .wipe::-moz-range-thumb { width: 1px }
.stage:focus-within { outline: 3px solid var(--accent); outline-offset: 2px } [hidden] { display: none !important }
.pictures[data-show=difference] .difference { visibility: visible }
.pictures[data-show=difference] .wipe, .pictures[data-show=difference] .stage::after { visibility: hidden }
.filters { position: absolute; width: 0; height: 0 }
"""

PICTURE_SCRIPT: Final = """
for (const section of document.querySelectorAll('.pictures')) {
  const wipes = section.querySelectorAll('.wipe');
  const amplify = section.querySelector('.amplify');
  const chosen = (group) => section.querySelector('.' + group + ' input:checked');
  const sync = () => {
    const of = chosen('of').value;
    for (const part of section.querySelectorAll('[data-of]')) part.hidden = part.dataset.of !== of;
    section.dataset.show = chosen('show').value;
    const factor = 2 ** amplify.value;
    section.style.setProperty('--amplify', 'url(#x' + factor + ')');
    section.querySelector('output').textContent = 'x' + factor;
    amplify.setAttribute('aria-valuetext', 'x' + factor);
    for (const wipe of wipes) {
      wipe.parentElement.style.setProperty('--at', wipe.value + '%');
      wipe.setAttribute('aria-valuetext', wipe.value + ' % ' + section.dataset.before);
    }
  };
  section.addEventListener('input', sync);
  sync();
}
"""


@dataclass(frozen=True)
class Other:
    """What one origin has in place of the first's picture.

    Attributes:
        picture: a data URI.
        difference: a data URI of the square root of the absolute difference to the first's, white being 1, so that
            eight bits tell small differences.
        note: such as a PSNR.
    """

    picture: str
    difference: str
    note: str


@dataclass(frozen=True)
class Pictured:
    """One picture, by each origin.

    Attributes:
        caption: such as the prompt.
        size: width and height in pixels.
        first: a data URI.
        others: in the order of the section's names.
    """

    caption: str
    size: tuple[int, int]
    first: str
    others: Sequence[Other]


def data_uri(kind: str, data: bytes) -> str:
    """Return a picture's file as the address of an image; kind is `png` or `webp`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_section(first: str, names: Sequence[str], pictures: Sequence[Pictured], *, tiny: bool, key: str) -> str:
    """Return the part of a page that shows pictures; it needs PICTURE_STYLE and PICTURE_SCRIPT, and is one of a page.

    Args:
        first: the name of what the others are held against.
        names: of the others.
        pictures: one card each.
        tiny: enlarge pixels as squares, and make the cards narrow.
        key: of the section's controls, a letter or more.
    """
    of = {str(place): name for place, name in enumerate(names)}
    show = {"slider": f"{first} | other" if len(names) > 1 else f"{first} | {names[0]}", "difference": "difference"}
    cards = "".join(_card(first, names, picture) for picture in pictures)
    return (
        f'{_filters()}<section class="pictures" data-show="slider" data-before="{html.escape(first)}" '
        f'style="--amplify:url(#x{_FACTORS[_FIRST_FACTOR]})">'
        f"{_choice('of', key, of, hidden=len(names) == 1)}{_choice('show', key, show)}"
        f'<div class="controls"><label>amplify the difference <input class="amplify" type="range" min="0" '
        f'max="{len(_FACTORS) - 1}" value="{_FIRST_FACTOR}"></label> <output>x{_FACTORS[_FIRST_FACTOR]}</output></div>'
        f'<div class="cards{" tiny" if tiny else ""}">{cards}</div></section>'
    )


def _filters() -> str:
    """Return the filters that square a difference's root again and multiply it."""
    channels = "<feFunc{} type='gamma' exponent='2' amplitude='{}' offset='0'/>"
    filters = "".join(
        f"<filter id='x{factor}' color-interpolation-filters='sRGB'><feComponentTransfer>"
        f"{''.join(channels.format(channel, factor) for channel in 'RGB')}</feComponentTransfer></filter>"
        for factor in _FACTORS
    )
    return f"<svg class='filters' aria-hidden='true'>{filters}</svg>"


def _choice(group: str, key: str, values: Mapping[str, str], *, hidden: bool = False) -> str:
    buttons = "".join(
        f'<label><input type="radio" name="{key}-{group}" value="{value}"{"" if place else " checked"}> '
        f"{html.escape(name)}</label>"
        for place, (value, name) in enumerate(values.items())
    )
    label = {"of": "what is held against the first", "show": "what is shown"}[group]
    return (
        f'<div class="controls {group}" role="radiogroup" aria-label="{label}"{" hidden" if hidden else ""}>'
        f"{buttons}</div>"
    )


def _card(first: str, names: Sequence[str], picture: Pictured) -> str:
    width, height = picture.size
    caption, before = html.escape(picture.caption), html.escape(first)
    images, notes = [], []
    for place, (name, other) in enumerate(zip(names, picture.others, strict=True)):
        shown = f'data-of="{place}"{" hidden" if place else ""}'
        told = html.escape(name)
        images.append(
            f'<img class="after" {shown} alt="{caption}, {told}" src="{other.picture}">'
            f'<img class="difference" {shown} alt="{caption}, difference of {told}" src="{other.difference}">'
        )
        notes.append(f"<small {shown}>{html.escape(other.note)}</small>")
    return (
        f'<figure class="card"><div class="stage" style="aspect-ratio:{width}/{height}">'
        f'<img alt="{caption}, {before}" src="{picture.first}">{"".join(images)}'
        f'<input class="wipe" type="range" min="0" max="100" value="50" aria-label="{caption}: how much of {before}">'
        f"</div><figcaption>{caption} {''.join(notes)}</figcaption></figure>"
    )
