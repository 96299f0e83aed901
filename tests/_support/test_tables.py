"""Tables align numbers right and text left, with and without rich, and fit the terminal."""

import sys

import pytest

from tfbn._support import tables

HEADER = ["layer", "values", "reason"]
ROWS = [["block/norm", "1,024", "no layer takes it up"], ["norm", "9.5 σ", ""], ["n", "", "why"]]


@pytest.fixture(params=["rich", "no rich"])
def renderer(request, monkeypatch):
    if request.param == "no rich":
        for name in ("rich", "rich.box", "rich.console", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 40 columns."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")


def test_numbers_are_aligned_right_and_text_left(renderer):
    title, header, rule, *lines = tables.text("Title", HEADER, ROWS).splitlines()
    assert title == "Title"
    assert set(rule.strip()) in ({"-"}, {"─"})
    ends = [
        line.index(cell) + len(cell) for line, (_, cell, _) in zip(lines[:2], ROWS, strict=False)
    ]
    assert ends == [header.index("values") + len("values")] * 2
    starts = [line.index(cell) for line, (_, _, cell) in zip(lines[::2], ROWS[::2], strict=True)]
    assert starts == [header.index("reason")] * 2


def test_a_row_takes_one_line_where_the_output_is_no_terminal(renderer):
    rows = [["a" * 300, "1", "word " * 60]]
    assert len(tables.text("Title", HEADER, rows).splitlines()) == 4


def test_lines_fit_a_terminal_and_lose_nothing(renderer, terminal):
    words = [f"w{number}" for number in range(30)]
    rows = [["outer/middle/inner/batch_normalization", "1", " ".join(words)]]
    shown = tables.text("A title that is longer than the terminal is wide", HEADER, rows)
    assert max(map(len, shown.splitlines())) <= 40
    assert all(word in shown.split() for word in words)


@pytest.mark.parametrize("rows", [[], [["only", "1", ""]]])
def test_a_table_may_have_few_rows(renderer, rows):
    assert "layer" in tables.text("Title", HEADER, rows)


def test_markdown_aligns_likewise_and_escapes_bars():
    lines = tables.markdown(HEADER, [*ROWS, ["a|b", "2", ""]]).splitlines()
    assert lines[1] == "| --- | ---: | --- |"
    assert lines[-1] == "| a\\|b | 2 |  |"


def test_in_a_notebook_the_table_is_still_text(renderer, monkeypatch):
    if sys.modules["rich.console"] is not None:
        monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "block/norm" in tables.text("Title", HEADER, ROWS)
