"""Pages of reports: one file that loads nothing, and whose parts find each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fp4trt.html_page import inline_svg, page
from fp4trt.html_pictures import PICTURE_SCRIPT, PICTURE_STYLE, Other, Pictured, data_uri, picture_section


class Tags(HTMLParser):
    """Counts what stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_is_closed_names_only_ids_that_it_has_and_no_address() -> None:
    picture = data_uri("png", b"\x89PNG")
    others = [Other(picture, picture, "PSNR 30.0 dB"), Other(picture, picture, "PSNR 20.0 dB")]
    section = picture_section("BF16", ["a", "<b>"], [Pictured('a "cat"', (8, 8), picture, others)], tiny=True, key="k")
    text = page("fp4trt test", "Test", section, style=PICTURE_STYLE, script=PICTURE_SCRIPT)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert set(re.findall(r"url\(#(\w+)\)", text)) <= set(re.findall(r"id='(\w+)'", text))
    assert "http:" not in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


def test_a_plot_keeps_the_ids_that_it_uses_alone() -> None:
    svg = '<?xml?><svg xmlns="http://www.w3.org/2000/svg"><g id="a"/><use xlink:href="#m"/><path id="m"/></svg>'
    assert inline_svg(svg, "plot") == (
        '<svg role="img" aria-label="plot"><g/><use xlink:href="#m"/><path id="m"/></svg>'
    )


def test_the_script_is_javascript() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    subprocess.run([node, "--check", "-"], input=PICTURE_SCRIPT, text=True, check=True, timeout=20)
