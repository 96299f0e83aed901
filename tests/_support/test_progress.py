"""The progress bar shows where `verbose` asks for it, and never where output is no terminal."""

import io

import pytest

from tfbn._support import progress
from tfbn._support.progress import Progress, prints_result


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, verbose, stream) -> str:
    monkeypatch.setattr("sys.stdout", stream)
    bar = Progress(verbose, "batch")
    for _ in range(3):
        bar.tick(3)
    return stream.getvalue()


@pytest.mark.parametrize("verbose", [1, True])
def test_a_bar_counts_to_the_target(verbose, monkeypatch):
    assert "3/3" in shown(monkeypatch, verbose, io.StringIO())


def test_two_is_one_line_at_the_end(monkeypatch):
    assert shown(monkeypatch, 2, io.StringIO()).count("\n") == 1


@pytest.mark.parametrize("verbose", [0, False, "auto"])
def test_nothing_else_shows_outside_of_a_terminal(verbose, monkeypatch):
    assert shown(monkeypatch, verbose, io.StringIO()) == ""


def test_auto_shows_in_a_terminal_what_takes_long(monkeypatch):
    assert shown(monkeypatch, "auto", Terminal()) == ""
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    assert "3/3" in shown(monkeypatch, "auto", Terminal())


@pytest.mark.parametrize("verbose", [3, -1, "yes", None, 1.0])
def test_anything_else_is_refused(verbose):
    with pytest.raises(ValueError, match='`verbose` must be 0, 1, 2 or "auto"'):
        Progress(verbose)


def test_only_who_asks_gets_the_result_printed():
    assert [prints_result(verbose) for verbose in (0, 1, 2, "auto")] == [False, True, True, False]
