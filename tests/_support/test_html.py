"""The pages of reports: well-formed, self-contained, and nothing of a user's names becomes markup."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tfbn._support import html

NASTY = '<script>alert("&")</script>'
VOID = {"meta", "!doctype"}


class Balance(HTMLParser):
    """Fails where a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID | {"wbr", "circle", "rect", "line"}:
            self.open.append(tag)
        assert tag not in ("script", "img", "link")

    def handle_endtag(self, tag):
        if tag not in ("circle", "rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(path) -> Balance:
    page = Balance()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def everything() -> list[str]:
    return [
        html.heading(NASTY),
        html.paragraph(NASTY, "soft"),
        html.box(NASTY, [html.labelled(NASTY, NASTY, code=True)], "error"),
        html.table([NASTY, "n"], [[NASTY, "1"]], [False, True], {1: [1.0]}, [True]),
        html.squares([NASTY], [NASTY], [NASTY, "other"]),
        html.plots([html.scatter([1, 2], [2, 3], NASTY, NASTY)]),
    ]


def test_whatever_a_page_shows_is_escaped_and_every_tag_is_closed(tmp_path):
    html.write(tmp_path / "page.html", NASTY, everything())
    texts = "".join(read(tmp_path / "page.html").texts)
    assert texts.count(NASTY) == 14


def test_a_page_needs_no_other_file_and_no_network(tmp_path):
    html.write(tmp_path / "page.html", "π & more", everything())
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|url\(|@import|<link", text)
    assert '<meta charset="utf-8">' in text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize("log", [False, True])
def test_dots_lie_on_the_line_exactly_where_both_are_equal(log):
    xs, ys = [0.1, 1.0, 10.0, 10.0], [0.1, 1.0, 10.0, 0.1]
    svg = ElementTree.fromstring(html.scatter(xs, ys, "x", "y", log)).find("svg")
    line = svg.find("line")
    low_x, low_y = float(line.get("x1")), float(line.get("y1"))
    dots = [(float(c.get("cx")) - low_x, low_y - float(c.get("cy"))) for c in svg.iter("circle")]
    assert all(abs(x - y) < 0.2 for x, y in dots[:3])
    assert dots[3][0] - dots[3][1] > 100
    middle = (dots[1][0] - dots[0][0]) / (dots[2][0] - dots[0][0])
    assert middle == pytest.approx(0.5 if log else 0.9 / 9.9, abs=0.01)


@pytest.mark.parametrize(
    ("xs", "ticks"),
    [
        ([0.5, 3.0], ["0.5", "1", "2"]),
        ([0.01, 4.0], ["0.01", "0.03", "0.1", "0.3", "1", "3"]),
        ([1e-9, 1e9], ["1e-10", "1e-06", "0.01", "100", "1e+06", "1e+10"]),
    ],
)
def test_the_ticks_of_a_logarithmic_axis_are_round(xs, ticks):
    svg = ElementTree.fromstring(html.scatter(xs, xs, "x", "y", log=True)).find("svg")
    texts = [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"]
    assert texts[:-2] == ticks


def test_what_cannot_be_drawn_is_left_out():
    nan, inf = float("nan"), float("inf")
    assert html.scatter([nan, inf, -1.0], [1.0, 1.0, 1.0], "x", "y", log=True) == ""
    assert html.scatter([1.0, nan], [1.0, 1.0], "x", "y").count("<circle") == 1
    assert "width:100.0%" in html.table(["n"], [["inf"]], [True], {0: [inf]})
